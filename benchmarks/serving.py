"""How many chains and labels of an export differ when another engine serves it.

    python benchmarks/serving.py --run=runs/stage1 --chains=chains.json       # ours, in float32
    python benchmarks/serving.py --chains=chains.json --engine=transformers --dtype=bfloat16

The first line exports the run and writes the greedy chains of the first test pairs that fit into a
prompt. The others need the engine and no she_jax, so each engine may have an environment of its
own: transformers (with torch), vllm, or ctranslate2 (``--folder`` is then what its converter wrote,
beside the export).
"""

import argparse
import json
from pathlib import Path
from typing import Any


def write_chains(run: Path, count: int, target: Path) -> None:
    """Exports a run, and writes texts and greedy chains of its pairs."""
    from she_jax.data.dataset import open_split
    from she_jax.generate.generator import Generator
    from she_jax.generate.prompts import product_text, query_text
    from she_jax.models.sharding import make_mesh
    from she_jax.runs.decide import pairs_of_run
    from she_jax.runs.export import export_run
    from she_jax.runs.load import load_run

    folder = export_run(run)
    lm, params, _ = load_run(run, make_mesh(fsdp=-1))
    split, frame = open_split(pairs_of_run(run).path, "test"), lm.prompts.frame
    pairs = []
    for row in range(len(split)):
        if lm.prompts.prompt_sizes([split[row]])[0] <= lm.prompts.prompt_length:
            pairs.append(split[row])
        if len(pairs) == count:
            break
    samples = Generator(lm, 100).greedy_samples(params, pairs, lambda done: None)
    texts = [f"{frame.opening}{query_text(e)}{product_text(e)}{frame.closing}" for e in pairs]
    chains = [sample.text for sample in samples]
    values = {"folder": str(folder), "length": lm.prompts.completion_length}
    target.write_text(json.dumps(values | {"texts": texts, "chains": chains}), encoding="utf-8")
    print(f"{len(pairs)} chains: {target}")


def with_transformers(folder: str, texts: list[str], dtype: str, length: int) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    written = []
    for first in range(0, len(texts), 50):
        inputs = tokenizer(texts[first : first + 50], padding=True, return_tensors="pt")
        tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        written += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return written


def with_vllm(folder: str, texts: list[str], dtype: str, length: int) -> list[str]:
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    return [result.outputs[0].text for result in LLM(folder, dtype=dtype).generate(texts)]


def with_ctranslate2(folder: str, texts: list[str], dtype: str, length: int) -> list[str]:
    import ctranslate2  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(folder).parent / "export")
    generator = ctranslate2.Generator(folder, compute_type=dtype)
    prompts = [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in texts]
    results = generator.generate_batch(
        prompts, max_length=length, include_prompt_in_result=False, max_batch_size=50
    )
    return [tokenizer.decode(r.sequences_ids[0], skip_special_tokens=True) for r in results]


ENGINES = {
    "transformers": with_transformers,
    "vllm": with_vllm,
    "ctranslate2": with_ctranslate2,
}


def label(chain: str) -> str:
    """The label line of a chain, "" if it has none."""
    return next((line for line in chain.split("\n") if line.startswith("label:")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="of a policy: write its chains")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--chains", type=Path, required=True, help="file of our chains")
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", default="", help="of the model; the export if it is not given")
    options = parser.parse_args()
    if options.run:
        write_chains(options.run, options.pairs, options.chains)
    if not options.engine:
        return
    ours: dict[str, Any] = json.loads(options.chains.read_text(encoding="utf-8"))
    serve, folder = ENGINES[options.engine], options.folder or ours["folder"]
    written = serve(folder, ours["texts"], options.dtype, ours["length"])
    pairs = [(old.strip(), new.strip()) for old, new in zip(ours["chains"], written, strict=True)]
    chains = sum(old != new for old, new in pairs)
    labels = sum(label(old) != label(new) for old, new in pairs)
    print(
        f"{options.engine} {options.dtype}: of {len(pairs)} {chains} chains, {labels} labels differ"
    )


if __name__ == "__main__":
    main()
