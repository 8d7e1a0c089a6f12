"""Trains a small Llama or Qwen3 from any text and writes a Hugging Face folder: the kind of model rdopt's demo is.

The forward pass is the package's own operator; Flax owns the parameters, Optax steps them (AdamW, or Muon by
Jordan 2024), Orbax keeps the state: a killed run started again goes on and ends with the same weights.

    python scripts/train_demo_lm.py --text my_texts/ --tokens 12e6 --out my-model

The Qwen3-like model of the measurements, qwen3-code, takes 45 minutes on two idle cores. Its text is the standard
library's sources (Python 3.11.7: 10.7 MB, 8.2 M tokens in five epochs; test documents kept out):

    import json, pathlib, sysconfig
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "encodings", "idle_test"}
    with open("stdlib.jsonl", "w") as out:
        for path in sorted(root.rglob("*.py")):
            if not skip & set(path.relative_to(root).parts):
                try:
                    text = path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue
                if text.strip():
                    print(json.dumps({"text": text}), file=out)

    python scripts/train_demo_lm.py --family qwen3 --tied --hidden 256 --layers 4 --heads 4 --kv-heads 2 \\
        --head-dim 64 --ffn 512 --text stdlib.jsonl --train-tokenizer --vocab 1536 --tokens 8.2e6 --keep-checkpoints \\
        --out qwen3-code
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int
from outputs import exit_code
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rdopt.calibration.text import read_documents, split_documents
from rdopt.calibration.tokens import fingerprint, load_tokenizer, tokenize
from rdopt.checkpoint.atomic import new_file, new_folder
from rdopt.checkpoint.families import MATRICES, Architecture, architecture_from_config, block_shapes
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.checkpoint.write import carried_files, write_checkpoint
from rdopt.config.errors import UserError
from rdopt.operator.llama import logits
from rdopt.operator.params import Params, params_to_tensors

SPECIAL = ("<unk>", "<s>", "</s>")
WEIGHT_DECAY = 0.1
FAMILIES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the weights that come out, besides the text."""

    optimizer: Literal["adamw", "muon"]
    steps: int
    batch: int
    context: int
    lr: float
    seed: int


class Llama(nn.Module):
    """The parameters of a network whose forward pass is `rdopt.operator.logits`."""

    arch: Architecture

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Next-token logits, float32."""
        arch = self.arch
        normal, ones = nn.initializers.normal(0.02), nn.initializers.ones
        table = (arch.vocab_size, arch.hidden_size)
        params: Params = {
            "embed": self.param("embed", normal, table),
            "blocks": {s: self.param(s, _initial(s, arch), (arch.num_layers, *shape))
                       for s, shape in block_shapes(arch).items()},
            "final_norm": self.param("final_norm", ones, (arch.hidden_size,)),
        }
        if not arch.tied:
            params["head"] = self.param("head", normal, table)
        return logits(params, tokens, arch)


def _initial(short: str, arch: Architecture) -> Any:
    """Ones for gains; normal for matrices, smaller where 2 L of them add up in the stream (GPT-2)."""
    if short not in MATRICES:
        return nn.initializers.ones
    return nn.initializers.normal(0.02 / math.sqrt(2 * arch.num_layers) if short in ("o", "down") else 0.02)


def operator_params(owned: dict[str, Any], arch: Architecture) -> Params:
    """Flax's flat dict of parameters as the operator's pytree."""
    blocks = {short: owned[short] for short in block_shapes(arch)}
    return {"blocks": blocks} | {name: value for name, value in owned.items() if name not in blocks}


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW or Muon under a cosine with 5 % warmup, gradients clipped at norm 1.

    Muon turns the matrices of the blocks and leaves the rest to Adam, undecayed; its updates have the root
    mean square of AdamW's (Liu 2502.16982), so that one learning rate suits both.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.lr, max(1, recipe.steps // 20), recipe.steps + 1, 0.05 * recipe.lr)
    if recipe.optimizer == "muon":
        rule = optax.contrib.muon(schedule, weight_decay=WEIGHT_DECAY, adam_b2=0.95, consistent_rms=0.2,
                                  muon_weight_dimension_numbers=cast(Any, _muon_axes))
    else:
        rule = optax.adamw(schedule, b2=0.95, weight_decay=WEIGHT_DECAY, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def _decayed(owned: dict[str, Any]) -> dict[str, bool]:
    """Matrices and tables, not gains."""
    return {name: name in (*MATRICES, "embed", "head") for name in owned}


def _muon_axes(owned: dict[str, Any]) -> dict[str, Any]:
    """Block matrices are stacked (L, out, in): each layer is a matrix of its own."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
    return {name: axes if name in MATRICES else None for name in owned}


def sequences(stream: Int[np.ndarray, " n"], context: int, start: int = 0) -> Int[np.ndarray, "m context+1"]:
    """Inputs and targets: pieces of context + 1 tokens, each beginning with the last of the one before."""
    count = (len(stream) - 1 - start) // context
    places = start + context * np.arange(count)[:, None] + np.arange(context + 1)[None, :]
    return stream[places]


class Batches:
    """The batch of each step as a function of (seed, step) alone; every epoch cuts at another offset."""

    def __init__(self, stream: Int[np.ndarray, " n"], recipe: Recipe) -> None:
        self.recipe = recipe
        self.per_epoch = (len(stream) - 1) // recipe.context - 1
        if self.per_epoch < 1:
            raise UserError(f"The training text has {len(stream)} tokens, but --context {recipe.context} "
                            f"needs at least {2 * recipe.context + 1}: give more text or shorten --context.")
        self._epoch = lru_cache(maxsize=2)(lambda epoch: self._drawn(stream, epoch))

    def __call__(self, step: int) -> Int[np.ndarray, "batch context+1"]:
        """The sequences of one step, int32."""
        first = step * self.recipe.batch
        places = (divmod(i, self.per_epoch) for i in range(first, first + self.recipe.batch))
        return np.stack([self._epoch(epoch)[place] for epoch, place in places])

    def _drawn(self, stream: Int[np.ndarray, " n"], epoch: int) -> Int[np.ndarray, "per_epoch context+1"]:
        rng = np.random.default_rng((self.recipe.seed, epoch))
        cut = sequences(stream, self.recipe.context, int(rng.integers(self.recipe.context)))
        return cut[rng.permutation(len(cut))[: self.per_epoch]]


def make_functions(model: Llama, rule: optax.GradientTransformation) -> tuple[Any, Any]:
    """The jitted training step (state, batch) -> (state, loss), and (params, batch) -> loss; nats/token."""
    def loss_of(owned: dict[str, Any], batch: Int[Array, "B T+1"]) -> Float[Array, ""]:
        predicted = cast(Array, model.apply({"params": owned}, batch[:, :-1]))
        return optax.softmax_cross_entropy_with_integer_labels(predicted, batch[:, 1:]).mean()

    def step(state: dict[str, Any], batch: Int[Array, "B T+1"]) -> tuple[dict[str, Any], Float[Array, ""]]:
        loss, slope = jax.value_and_grad(loss_of)(state["params"], batch)
        updates, rule_state = rule.update(slope, state["rule"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "rule": rule_state}, loss

    return jax.jit(step, donate_argnums=0), jax.jit(loss_of)


class Progress:
    """A line every few steps: step, mean loss since the last line, tokens/s and the time left."""

    def __init__(self, recipe: Recipe, first: int) -> None:
        self.recipe, self.losses = recipe, []
        self.every = max(1, min(20, recipe.steps // 10))
        self.counted, self.began = first, 0.0

    def step(self, done: int, loss: Float[Array, ""]) -> None:
        """Notes the loss of step `done`; the clock starts after the first, which compiles."""
        self.losses.append(loss)
        if not self.began:
            jax.block_until_ready(loss)
            self.counted, self.began = done, time.perf_counter()
        if done % self.every == 0 or done == self.recipe.steps:
            mean = float(np.mean(self.losses))
            if not math.isfinite(mean):
                raise UserError(f"The loss is {mean} at step {done}: take an --lr below {self.recipe.lr:g}.")
            seconds = time.perf_counter() - self.began
            rate = (done - self.counted) / seconds
            left = f"{(self.recipe.steps - done) / rate:.0f} s left" if rate else "timing"
            tokens = self.recipe.batch * self.recipe.context
            print(f"step {done}/{self.recipe.steps}  {done * tokens / 1e6:.2f} M tokens  loss {mean:.4f}  "
                  f"{rate * tokens:.0f} tokens/s  {left}", flush=True)
            self.losses.clear()


def train(recipe: Recipe, arch: Architecture, stream: Int[np.ndarray, " n"], folder: Path, every: int,
          keep: Callable[[int, dict[str, Any]], None]) -> dict[str, Any]:
    """Runs the steps that are left and returns Flax's parameters; the state is saved every `every` steps.

    Args:
        recipe: see `Recipe`.
        arch: of the network.
        stream: training tokens.
        folder: of the saved states.
        every: steps between two of them.
        keep: called with the step and the parameters before a state is saved.
    """
    model, rule, batches = Llama(arch), make_optimizer(recipe), Batches(stream, recipe)
    step, _ = make_functions(model, rule)
    owned = jax.jit(model.init)(jax.random.key(recipe.seed), jnp.zeros((1, 2), jnp.int32))["params"]
    state: Any = {"params": owned, "rule": jax.jit(rule.init)(owned)}
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(owned)):,} parameters; {recipe.steps} steps of "
          f"{recipe.batch} x {recipe.context} tokens, {recipe.steps * recipe.batch / batches.per_epoch:.1f} "
          f"epochs of {len(stream):,} tokens, {recipe.optimizer}", flush=True)
    kept = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=kept) as manager:
        first = manager.latest_step() or 0
        if first:
            state = manager.restore(first, args=ocp.args.StandardRestore(state))
            print(f"resumed at step {first}", flush=True)
        progress = Progress(recipe, first)
        for done in range(first + 1, recipe.steps + 1):
            state, loss = step(state, batches(done - 1))
            progress.step(done, loss)
            if done % every == 0 or done == recipe.steps:
                keep(done, state["params"])
                manager.save(done, args=ocp.args.StandardSave(state))
    return state["params"]


def heldout_loss(owned: dict[str, Any], arch: Architecture, stream: Int[np.ndarray, " n"], recipe: Recipe
                 ) -> tuple[float, int]:
    """Mean loss in nats/token of a stream, each token predicted once, and how many."""
    _, loss_of = make_functions(Llama(arch), optax.identity())
    cut = sequences(stream, recipe.context)
    pieces = [cut[i : i + recipe.batch] for i in range(0, len(cut), recipe.batch)]
    total = sum(float(loss_of(owned, piece)) * len(piece) for piece in pieces)
    return total / len(cut), len(cut) * recipe.context


def train_tokenizer(documents: Sequence[str], vocab: int, context: int, out: Path) -> None:
    """A byte-level BPE of at most `vocab` tokens as a folder that `tokenize` and transformers read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab < len(SPECIAL) + len(alphabet):
        raise UserError(f"--vocab is {vocab}, but bytes and special tokens alone take "
                        f"{len(SPECIAL) + len(alphabet)}: ask for at least that.")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
             "eos_token": "</s>", "model_max_length": context}
    with new_folder(out) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
        (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}) + "\n")


def model_config(args: argparse.Namespace, tokenizer: Path) -> dict[str, Any]:
    """The config.json of the model to be."""
    path = tokenizer / "config.json"
    ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        "architectures": [FAMILIES[args.family]], "model_type": args.family, "hidden_act": "silu",
        "vocab_size": 1 + max(load_tokenizer(tokenizer).get_vocab().values()),
        "hidden_size": args.hidden, "intermediate_size": args.ffn, "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads, "head_dim": args.head_dim,
        "max_position_embeddings": max(512, args.context), "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "attention_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "tie_word_embeddings": args.tied, "pad_token_id": None,
        "bos_token_id": ids.get("bos_token_id"), "eos_token_id": ids.get("eos_token_id"),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Train a small language model from text; run the same line again to go on after a kill.",
        epilog="example: %(prog)s --text texts/ --split-on blank2 --tokens 12e6 --out my-model")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="Hugging Face folder to write")
    p.add_argument("--text", nargs="+", default=["builtin"], metavar="PATH",
                   help="files or folders (.txt, .jsonl, .gz), or builtin: Python's docstrings")
    p.add_argument("--split-on", default="file", choices=("line", "blank", "blank2", "file"))
    p.add_argument("--tokenizer", default="demo", metavar="FOLDER", help="whose tokenizer.json to use")
    p.add_argument("--train-tokenizer", action="store_true", help="train a byte-level BPE instead")
    p.add_argument("--vocab", type=int, default=2048, metavar="N", help="tokens of the trained tokenizer")
    p.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    p.add_argument("--tokens", type=float, default=12e6, metavar="N", help="tokens to train on")
    p.add_argument("--batch", type=int, default=16, help="sequences in a step")
    p.add_argument("--context", type=int, default=256, help="tokens in a sequence")
    p.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    p.add_argument("--seed", type=int, default=0)
    for name, value in (("hidden", 192), ("layers", 5), ("heads", 6), ("kv-heads", 3), ("head-dim", 32),
                        ("ffn", 512)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--family", default="llama", choices=tuple(FAMILIES), help="qwen3 normalises queries and keys")
    p.add_argument("--tied", action="store_true", help="one table for embedding and head")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    p.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    p.add_argument("--keep-checkpoints", action="store_true", 
                   help="leave DIR.steps: a folder of the model at every saved step")
    return p


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The checked recipe.

    Raises:
        UserError: a number is out of range.
    """
    for name in ("tokens", "batch", "context", "lr", "hidden", "layers", "heads", "kv_heads", "head_dim",
                 "ffn", "save_every"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but it must be above 0.")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, but it must be at least 0.")
    return Recipe(optimizer=args.optimizer, steps=math.ceil(args.tokens / (args.batch * args.context)),
                  batch=args.batch, context=args.context, lr=args.lr, seed=args.seed)


def claim(work: Path, facts: dict[str, Any]) -> None:
    """Marks the training folder as this run's, or checks that it already is.

    Raises:
        UserError: it belongs to a run with other settings or text.
    """
    path = work / "run.json"
    if not path.is_file():
        with new_file(path) as file:
            file.write_text(json.dumps(facts, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    other = [f"{k} was {before.get(k)}, now {facts[k]}" for k in facts if before.get(k) != facts[k]]
    if other:
        raise UserError(f"{work} holds a run with other settings ({other[0]}): repeat its settings, remove "
                        "the folder, or choose another --out.")


def run(args: argparse.Namespace) -> None:
    """Text to tokens, tokens to weights, weights to the folder."""
    recipe, work = recipe_of(args), args.out.with_name(args.out.name + ".training")
    if args.out.exists():
        raise UserError(f"{args.out} exists already: remove it or choose another --out.")
    split = split_documents(read_documents(args.text, args.split_on))
    seen = split.calibration + split.selection
    tokenizer = work / "tokenizer" if args.train_tokenizer else _tokenizer_folder(args.tokenizer)
    if args.train_tokenizer and not tokenizer.is_dir():
        train_tokenizer(seen, args.vocab, args.context, tokenizer)
    config = model_config(args, tokenizer)
    arch = architecture_from_config(config)
    stream, test = (tokenize(tokenizer, part, arch.vocab_size) for part in (seen, split.test))
    if len(test) <= recipe.context:
        raise UserError(f"The held-out text has {len(test)} tokens, but one sequence needs "
                        f"{recipe.context + 1}: give more text, cut it finer, or shorten --context.")
    claim(work, asdict(recipe) | {"architecture": repr(arch), "text": fingerprint(stream)})

    def write(out: Path, owned: dict[str, Any], dtype: str) -> None:
        """A Hugging Face folder of some parameters."""
        tensors = params_to_tensors(operator_params(jax.device_get(owned), arch), arch)
        write_checkpoint(out, config, tensors, dtype=dtype, files=carried_files(tokenizer))

    def keep(step: int, owned: dict[str, Any]) -> None:
        """One folder of the trajectory, in float32; a resumed run finds some already there."""
        place = args.out.with_name(args.out.name + ".steps") / f"step-{step:06d}"
        if args.keep_checkpoints and not place.exists():
            write(place, owned, "float32")

    owned = jax.device_get(train(recipe, arch, stream, work / "state", args.save_every, keep))
    loss, counted = heldout_loss(owned, arch, test, recipe)
    print(f"held-out loss {loss:.4f} nats/token over {counted} tokens (test part, context {recipe.context})")
    write(args.out, owned, args.dtype)
    shutil.rmtree(work)
    print(f"wrote {args.out}")


def _tokenizer_folder(name: str) -> Path:
    return open_checkpoint("demo").folder if name == "demo" else Path(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 2 after a sentence on standard error."""
    return exit_code(run, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
