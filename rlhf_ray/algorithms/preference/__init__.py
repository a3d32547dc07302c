"""Losses that train a policy from preferences, without a reward model.

Each method is a composition of functions of these files: sums of log-probs per answer (sequence), scores of a ratio
(divergence), and one loss of margins (margin), of both ratios (ratio), of whole batches (transport), of odds (odds) or
of single answers (unpaired). The words mean:

    log-prob    log π(y|x), the sum over the answer's tokens, in nats
    mean        log-prob / number of tokens
    log-ratio   log π(y|x) - log π_ref(y|x), also log u
    reward      β · log-ratio
    margin      that of the chosen answer - that of the rejected one

Tensors are flat, one value per pair (`[pairs]`) or per answer (`[rows]`), float32 or wider; gradients flow through
all floating arguments unless the function says otherwise. Losses come back unreduced, one per pair or row, in the dtype
of the arguments. They and their gradients are finite in float32 for log-ratios and margins up to 1e15 in absolute value
(squares overflow first); the few that would need a bound on exponents or odds for it name the bound.

"Descent raises the chosen and lowers the rejected log-prob" says: the gradient with respect to the chosen one is at
most 0 and that with respect to the rejected one at least 0, everywhere. Losses for which that is not so say where.
"""
