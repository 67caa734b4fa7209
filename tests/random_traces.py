"""Traces without a model: random scalings under names as those of a Llama."""

import torch

from xloom.trace import About, Tokens, Trace

EXPERTS = ("chem", "mech", "prot")
SITES = tuple(
    f"model.layers.{layer}.{module}" for layer in range(3) for module in ("self_attn.q_proj", "mlp.down_proj")
)
ABOUT = About(SITES, EXPERTS, metadata={"domain": "a"})


def placed_scalings(count: int, start: int = 0) -> torch.Tensor:
    """Row t holds (start + t) mod 1000, which float16 holds exactly."""
    return (torch.arange(start, start + count) % 1000)[:, None, None].expand(-1, len(SITES), len(EXPERTS)).float()


def random_tokens(count: int, seed: int = 0, answer: int = 0) -> Tokens:
    """Letters, some of more than one byte and some empty; the last `answer` of them are the answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (count,), generator=generator)
    texts = ["", "é", " 日本", "\ud800", "<|im_end|>", *"abcdefgh"]
    is_answer = [at >= count - answer for at in range(count)]
    return Tokens.make(
        ids,
        [texts[i % len(texts)] for i in ids.tolist()],
        logprobs=-torch.rand(count, generator=generator),
        special=ids % len(texts) == 4,
        answer=is_answer,
        turns=[int(one) for one in is_answer],
        roles=["assistant" if one else "user" for one in is_answer],
    )


def random_trace(count: int = 20, seed: int = 0, *, answer: int = 5, total: float = 1.0, **metadata: object) -> Trace:
    """Scalings that sum to `total` at every token and site; the first token has none."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, len(SITES), len(EXPERTS), generator=generator)
    scalings = total * logits.softmax(dim=-1)
    scalings[:1] = torch.nan
    about = About(SITES, EXPERTS, "a/model", "XLora", {"top_k_lora": None}, dict(metadata))
    return Trace(random_tokens(count, seed, answer), scalings, about)
