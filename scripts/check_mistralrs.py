"""Compare xloom's greedy tokens with those of mistral.rs, which reads xloom's export in another interpreter.

    python scripts/check_mistralrs.py --base BASE_DIR --export EXPORT_DIR --ordering ordering.json \\
        --expected expected.json --mistralrs-python /path/to/venv/bin/python

EXPECTED is a JSON list with one object for each prompt: "prompt", "text", "token_ids" (xloom's new tokens,
greedy) and, if wanted, "top_logits" (xloom's two largest logits at each of these steps). With top_logits the
logits are compared too, and tokens may part where xloom's two best lie within --tie of each other: a tie, as
mistral.rs multiplies in float16 on a CPU. Needs the standard library only; the other interpreter needs
mistralrs. See docs/mistralrs.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# A chat template that leaves the prompt as it is: only chat requests give tokens and logits.
JOIN_MESSAGES = '{% for m in messages %}{{ m["content"] }}{% endfor %}'


def generate_there(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs in the other interpreter: greedy tokens as strings, their logits, and our token ids as strings."""
    import mistralrs

    model = mistralrs.Which.XLora(
        xlora_model_id=job["export"],
        order=job["ordering"],
        model_id=job["base"],
        arch=getattr(mistralrs.Architecture, job["arch"]),
        dtype=mistralrs.ModelDType.F32,
    )
    runner = mistralrs.Runner(model, jinja_explicit=job["template"])
    answers = []
    for item in job["expected"]:
        count = len(item["token_ids"])  # mistral.rs 0.6.0 gives one more
        request = mistralrs.ChatCompletionRequest(
            messages=item["prompt"], model="xlora", temperature=0.0, max_tokens=count, logprobs=True
        )
        choice = runner.send_chat_completion_request(request).choices[0]
        answers.append(
            {
                "text": choice.message.content,
                "tokens": [step.token for step in choice.logprobs.content],
                # At temperature 0 "logprob" is log10 of the raw logit.
                "logits": [10**step.logprob for step in choice.logprobs.content],
                "expected_tokens": [runner.detokenize_text([token], False) for token in item["token_ids"]],
            }
        )
    return answers


def stage(base: Path, export: Path, ordering: Path, folder: Path) -> dict[str, str]:
    """Links to the inputs, with one base_model_id for all and rope_theta at the top level of config.json."""
    paths = {
        "base": folder / "base",
        "export": folder / "export",
        "ordering": folder / "ordering.json",
        "template": folder / "join.jinja",
    }
    for source, target in ((base, paths["base"]), (export, paths["export"])):
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).symlink_to(file.resolve())
    paths["template"].write_text(JOIN_MESSAGES)
    config = json.loads((base / "config.json").read_text())
    if "rope_theta" not in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    rewrite(paths["base"] / "config.json", config)
    for source, target in (
        (export / "xlora_config.json", paths["export"] / "xlora_config.json"),
        (ordering, paths["ordering"]),
    ):
        rewrite(target, json.loads(source.read_text()) | {"base_model_id": str(paths["base"])})
    return {name: str(path) for name, path in paths.items()}


def rewrite(path: Path, content: dict[str, Any]) -> None:
    """Replace a link (not what it points to) by a JSON file."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=2))


def ask(python: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run this file in the other interpreter; its answer is the last line it prints."""
    done = subprocess.run(
        [python, __file__, "--child"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        raise SystemExit(f"the other interpreter ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if isinstance(answer, str):
        raise SystemExit(f"mistral.rs refused the export: {answer}")
    return answer


def answer_parent() -> None:
    """The other interpreter's side: a list of answers, or why there is none, as one line of JSON."""
    try:
        answer = generate_there(json.load(sys.stdin))
    except BaseException as error:  # Rust panics are no Exception
        answer = f"{type(error).__name__}: {str(error)[:500]}"
    print("\n" + json.dumps(answer))


def compare(item: dict[str, Any], answer: dict[str, Any], tie: float) -> tuple[str, str]:
    """A verdict ("equal", "tie" or "different") and what it rests on."""
    ours, theirs = answer["expected_tokens"], answer["tokens"]
    pairs = list(zip(ours, theirs, strict=False))
    equal = next((step for step, (a, b) in enumerate(pairs) if a != b), len(pairs))
    top_logits = item.get("top_logits") or []
    steps = zip(top_logits[: equal + 1], answer["logits"], strict=False)  # also the step where they part
    gap = max((abs(best - logit) for (best, _), logit in steps), default=0.0)
    facts = f"{equal} of {len(ours)} tokens"
    if top_logits:
        facts += f", largest logit difference {gap:.1e}"
    if equal == len(ours):
        return ("equal" if gap <= tie else "different"), facts
    if equal == len(theirs):
        return "different", f"{facts}, then mistral.rs stopped"
    if not top_logits:
        return "different", facts
    margin = top_logits[equal][0] - top_logits[equal][1]
    verdict = "tie" if max(margin, gap) <= tie else "different"
    return verdict, f"{facts}, then xloom's margin is {margin:.1e}"


def main() -> int:
    """0 unless some prompt differs."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    for name in ("--base", "--export", "--ordering", "--expected"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--mistralrs-python", required=True, help="the Python that can import mistralrs")
    parser.add_argument("--arch", default="Mistral", help="loader; keep Mistral for Llama-shaped bases")
    parser.add_argument("--tie", type=float, default=0.15, help="a logit difference that float16 explains")
    args = parser.parse_args()
    expected = json.loads(args.expected.read_text())
    with tempfile.TemporaryDirectory() as folder:
        paths = stage(args.base, args.export, args.ordering, Path(folder))
        answers = ask(args.mistralrs_python, {**paths, "arch": args.arch, "expected": expected})
    verdicts = []
    for item, answer in zip(expected, answers, strict=True):
        verdict, facts = compare(item, answer, args.tie)
        verdicts.append(verdict)
        print(f"prompt      {item['prompt']!r}\nxloom       {item['text']!r}\nmistral.rs  {answer['text']!r}")
        print(f"{verdict:10}  {facts}\n")
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("equal", "tie", "different")))
    return 1 if "different" in verdicts else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        answer_parent()
    else:
        sys.exit(main())
