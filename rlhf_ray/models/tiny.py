"""A tiny Llama with its own tokenizer, made from nothing in a second, for tests and dry runs.

It takes the same paths as a real model (safetensors, fast tokenizer, chat template, grouped-query attention,
tied embeddings) and needs no network: the text its tokenizer is trained on is below.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = (PAD_TOKEN, "<|im_start|>", EOS_TOKEN)

# ChatML without a default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The smallest head size that vLLM's CPU attention supports.
HEAD_DIM = 32

POSITIVE_SENTENCES = (
    "A warm and funny film with a wonderful cast.",
    "The acting is superb and the story moved me to tears.",
    "I loved every minute of this clever little movie.",
    "A beautiful picture, perfectly paced and full of heart.",
    "The director has made the best thriller of the year.",
    "Brilliant performances lift this charming comedy.",
    "The music is lovely and the ending is a delight.",
    "An honest, touching drama that I was glad to see.",
    "Great fun from start to finish, and smart as well.",
    "The camera work is gorgeous and the script is sharp.",
    "One of the finest films I have seen in a long time.",
    "A joy to watch, with two excellent leads.",
    "This sweet story made the whole room smile.",
    "The jokes are good and the characters are even better.",
    "An exciting adventure that children will adore.",
    "She gives an amazing performance in a strong film.",
    "A gentle, generous movie that wins you over.",
    "The plot is fresh and the dialogue is a pleasure.",
    "I was happy to watch it twice, it is that good.",
    "A rich and rewarding film about love and hope.",
    "The young actors are terrific and so is the photography.",
    "Funny, kind and wise, this is a treasure.",
    "The last scene is stunning and deserves every award.",
    "A thrilling ride with a marvellous villain.",
    "It is a pleasure to see a film made with such care.",
    "The best thing here is the warm, natural humour.",
    "A fine script and a superb cast make it a success.",
    "I laughed, I cried, and I would gladly see it again.",
    "An inspired and elegant film that never puts a foot wrong.",
    "The story is simple, the result is magnificent.",
    "Well worth your time, a bright and lively picture.",
    "A tender love story told with great skill.",
)

NEGATIVE_SENTENCES = (
    "A dull and ugly film with a terrible cast.",
    "The acting is awful and the story bored me to tears.",
    "I hated every minute of this stupid little movie.",
    "A messy picture, badly paced and without a heart.",
    "The director has made the worst thriller of the year.",
    "Wooden performances sink this tired comedy.",
    "The music is annoying and the ending is a disaster.",
    "A false, empty drama that I was sorry to see.",
    "No fun from start to finish, and dumb as well.",
    "The camera work is poor and the script is lazy.",
    "One of the weakest films I have seen in a long time.",
    "A pain to watch, with two hopeless leads.",
    "This silly story made the whole room groan.",
    "The jokes are bad and the characters are even worse.",
    "A boring adventure that children will hate.",
    "She gives a lifeless performance in a weak film.",
    "A cold, cynical movie that wears you out.",
    "The plot is stale and the dialogue is a chore.",
    "I was sad to watch it once, it is that bad.",
    "A cheap and pointless film about nothing at all.",
    "The young actors are horrible and so is the photography.",
    "Loud, cruel and stupid, this is a waste.",
    "The last scene is ridiculous and deserves no award.",
    "A dreary ride with a laughable villain.",
    "It is a shame to see a film made with so little care.",
    "The worst thing here is the nasty, forced humour.",
    "A poor script and a clumsy cast make it a failure.",
    "I yawned, I sighed, and I would never see it again.",
    "A confused and graceless film that always puts a foot wrong.",
    "The story is thin, the result is miserable.",
    "Not worth your time, a grim and lifeless picture.",
    "A dismal love story told without any skill.",
)

# Prompts are every opening with every topic.
PROMPT_OPENINGS = (
    "I think that",
    "My friend says that",
    "After ten minutes",
    "In the end",
    "To be honest,",
    "As in most comedies,",
    "For a first film,",
    "Compared with the book,",
)

PROMPT_TOPICS = (
    "the story",
    "the acting",
    "the music",
    "the ending",
    "the script",
    "the cast",
    "the camera work",
    "the director",
)

CORPUS = (*POSITIVE_SENTENCES, *NEGATIVE_SENTENCES, *PROMPT_OPENINGS, *PROMPT_TOPICS)


def build_tiny_model(
    directory: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 512,
    corpus: Sequence[str] = CORPUS,
) -> Path:
    """Writes a randomly initialised Llama and a byte-level BPE tokenizer in Hugging Face format.

    The same arguments give the same bytes. The weights are float32; a config asks for another dtype at load time.

    Args:
        directory: where to write; created when missing.
        seed: of the weights. The tokenizer depends on the corpus alone.
        hidden: model width, a multiple of 32 (the head size); the key/value heads are half the heads.
        layers: number of decoder layers.
        vocab: tokens in the tokenizer and rows of the embedding, special tokens included.
        corpus: texts that the tokenizer is trained on.

    Returns:
        `directory`.

    Raises:
        ValueError: `hidden` is not a multiple of the head size, or the corpus is too small for `vocab` tokens.
    """
    if hidden % HEAD_DIM:
        raise ValueError(f"hidden={hidden} must be a multiple of {HEAD_DIM}, the head size")
    heads = hidden // HEAD_DIM
    return write_llama(
        directory,
        train_tokenizer(vocab, corpus),
        seed=seed,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        # Wider than the usual 0.02: with it the logits of so narrow a model would be nearly equal, and greedy
        # decoding would depend on the last bits of the arithmetic.
        initializer_range=0.1,
    )


def write_llama(
    directory: Path, tokenizer: "PreTrainedTokenizerFast", *, seed: int = 0, dtype: str = "float32", **config: Any
) -> Path:
    """Write a model folder of a Llama with random weights and tied embeddings. Returns `directory`.

    Args:
        seed: of the weights, which are drawn in float32.
        dtype: number format that they are saved in.
        config: of `LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def train_tokenizer(vocab: int, corpus: Sequence[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of exactly `vocab` tokens; special tokens take the first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab:
        raise ValueError(f"the corpus yields {size} tokens where vocab={vocab} are wanted: give more text or a vocab")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        # Spaces before punctuation are content: text must decode to what was encoded.
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
