"""Pure tensor functions: KL estimates, advantages, statistics, score shaping and losses.

Every sample has at least one response token. Token-level tensors are flat, `[tokens]` over the response tokens of
several samples one after the other; `offsets` (int64, `[samples + 1]`) says where each sample begins, as in an Arrow
list array, so there is no padding and no mask. Nothing here knows of ranks, models or configuration: what has to hold
over the whole batch (moments, token counts) is an argument, computed per shard and merged by the caller.
"""
