"""Train the small Llama that ships in tq_mcp/demo_model, from scratch and reproducibly.

    python examples/train_demo_model.py lm_mix.txt.xz --output out --minutes 6

The text is split at blank lines into documents. An eighth of the rows also state made-up facts ("The
secret code of Oslo is 4 8 2 1 3.") and ask for them later, so that damage to a key-value cache shows
as forgotten facts. Needs torch, tokenizers, numpy and safetensors; a GPU is used where there is one.
The output folder is a Hugging Face checkpoint, rewritten as training goes, plus training.json, which
records the measurements and the number of steps: pass that as --steps to repeat a run.
"""

import argparse
import hashlib
import json
import lzma
import math
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch_llama import Llama, Loss, Shape

END = "<|endoftext|>"
END_ID = 0


# --- the data --------------------------------------------------------------------------------------


def read_documents(path: Path, limit_bytes: int | None) -> list[str]:
    with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
        text = file.read(limit_bytes if limit_bytes else -1).decode(errors="ignore")
    return [document for piece in text.split("\n\n") if (document := piece.strip())]


def train_tokenizer(documents: list[str], vocab_size: int, sample_bytes: int) -> Tokenizer:
    """Byte-level BPE, trained on documents spread evenly over the text."""
    every = max(1, sum(map(len, documents)) // sample_bytes)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents[::every], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one uint16 stream, each followed by the end token."""
    parts: list[np.ndarray] = []
    for start in range(0, len(documents), 2048):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + 2048]):
            parts.append(np.array([*encoding.ids, END_ID], dtype=np.uint16))
    return np.concatenate(parts)


class Facts:
    """Rows of text that state facts and ask for them; names are one-word titles found in the text."""

    def __init__(self, tokenizer: Tokenizer, documents: list[str], stream: np.ndarray, seed: int) -> None:
        titles = {document.split("\n", 1)[0] for document in documents}
        self.names = sorted(t for t in titles if re.fullmatch(r"[A-Z][a-z]{2,11}", t))
        self.tokenizer, self.stream, self.random = tokenizer, stream, np.random.default_rng(seed)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def draw(self) -> tuple[str, str]:
        name = self.names[self.random.integers(len(self.names))]
        return name, " ".join(str(d) for d in self.random.integers(0, 10, 5))

    def text(self, length: int) -> np.ndarray:
        start = self.random.integers(0, len(self.stream) - length)
        return self.stream[start : start + length]

    def row(self, length: int) -> np.ndarray:
        """One to four facts at random places, each asked for once after all were stated."""
        facts = [self.draw() for _ in range(self.random.integers(1, 5))]
        stated = [self.ids(f"\nThe secret code of {name} is {code}.\n") for name, code in facts]
        asked = [self.ids(f"\nQuestion: What is the secret code of {n}? Answer: {c}\n") for n, c in facts]
        room = length - sum(map(len, stated)) - sum(map(len, asked))
        cuts = np.sort(self.random.integers(0, room + 1, len(facts)))
        pieces = np.split(self.text(room), cuts)
        body = [part for pair in zip(pieces, stated, strict=False) for part in pair]
        order = self.random.permutation(len(facts))
        return np.concatenate([*body, pieces[-1], *(asked[i] for i in order)]).astype(np.uint16)

    def question(self, length: int) -> tuple[np.ndarray, list[int]]:
        """A prompt of exactly `length` tokens with one fact at a random depth, and its answer's tokens."""
        name, code = self.draw()
        fact = self.ids(f"\nThe secret code of {name} is {code}.\n")
        ask = self.ids(f"\nQuestion: What is the secret code of {name}? Answer:")
        text = self.text(length - len(fact) - len(ask))
        cut = self.random.integers(0, len(text) + 1)
        return np.concatenate([text[:cut], fact, text[cut:], ask]), self.ids(" " + code)


class Batches:
    """Rows of length + 1 tokens held on the device, in an order that depends only on the seed."""

    def __init__(
        self, stream: np.ndarray, facts: np.ndarray, rows: int, fact_rows: int, seed: int, device: str
    ) -> None:
        self.stream = torch.from_numpy(stream.astype(np.int32)).to(device)
        self.facts = torch.from_numpy(facts.astype(np.int32)).to(device)
        self.width = facts.shape[1]
        self.rows, self.fact_rows = rows, fact_rows
        self.random = torch.Generator().manual_seed(seed)
        self.columns = torch.arange(self.width, device=device)
        self.starts = torch.empty(0, dtype=torch.long)
        self.fact_order = torch.empty(0, dtype=torch.long)

    def next(self) -> Tensor:
        if len(self.starts) < self.rows:
            phase = int(torch.randint(self.width, (1,), generator=self.random))
            starts = torch.arange(phase, len(self.stream) - self.width, self.width - 1)
            self.starts = starts[torch.randperm(len(starts), generator=self.random)]
        if len(self.fact_order) < self.fact_rows:
            self.fact_order = torch.randperm(len(self.facts), generator=self.random)
        starts, self.starts = self.starts[: self.rows], self.starts[self.rows :]
        chosen, self.fact_order = self.fact_order[: self.fact_rows], self.fact_order[self.fact_rows :]
        device = self.stream.device
        text = self.stream[starts.to(device, non_blocking=True)[:, None] + self.columns]
        return torch.cat((text, self.facts[chosen.to(device, non_blocking=True)])).long()


# --- measuring and saving --------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(loss: Loss, stream: np.ndarray, length: int, rows: int, device: str) -> float:
    """Mean loss in nats a token over non-overlapping windows of held-out text."""
    count = min((len(stream) - 1) // length, 256)
    windows = np.stack([stream[i * length : i * length + length + 1] for i in range(count)]).astype(np.int64)
    batches = torch.from_numpy(windows).to(device).split(rows)
    return sum(float(loss(batch)) * len(batch) for batch in batches) / count


@torch.no_grad()
def recall(model: Llama, facts: Facts, length: int, questions: int, device: str) -> float:
    """The share of facts answered exactly, greedily, in prompts of `length` tokens."""
    prompts, answers = zip(*(facts.question(length) for _ in range(questions)), strict=True)
    tokens = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(device)
    for _ in range(max(map(len, answers))):
        window = tokens[:, -model.shape.max_position_embeddings :]
        tokens = torch.cat((tokens, model(window)[:, -1:].argmax(-1)), dim=1)
    said = tokens[:, length:].tolist()
    return sum(said[i][: len(answer)] == answer for i, answer in enumerate(answers)) / questions


@dataclass
class Record:
    """What training.json holds."""

    parameters: int
    data_sha256: str
    train_tokens: int
    seed: int
    rows: int
    length: int
    fact_share: float
    learning_rate: float
    warm_up: int
    device: str
    torch: str
    steps: int = 0
    steps_planned: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    held_out_loss: float = 0.0
    held_out_perplexity: float = 0.0
    held_out_bits_per_byte: float = 0.0
    recall: dict[str, float] = field(default_factory=dict)


def save(folder: Path, model: Llama, tokenizer: Tokenizer, record: Record) -> None:
    """Write a complete checkpoint: bfloat16 weights, config, tokenizer and the record of training."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": model.shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in {
        "config.json": config,
        "generation_config.json": {"bos_token_id": END_ID, "eos_token_id": END_ID},
        "tokenizer_config.json": tokenizer_config,
        "training.json": asdict(record),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


# --- training --------------------------------------------------------------------------------------


@dataclass
class Data:
    """The tokenizer, the training and held-out streams, and the rows of facts."""

    tokenizer: Tokenizer
    stream: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float
    fact_rows: np.ndarray
    asker: Facts

    @classmethod
    def prepare(cls, args: argparse.Namespace, vocab_size: int) -> "Data":
        began = time.perf_counter()
        documents = read_documents(args.text, int(args.limit_mb * 1e6) if args.limit_mb else None)
        held, documents = documents[::200], [d for i, d in enumerate(documents) if i % 200]
        tokenizer = train_tokenizer(documents, vocab_size, sample_bytes=20_000_000)
        stream, held_out = encode(tokenizer, documents), encode(tokenizer, held)
        facts = Facts(tokenizer, documents, stream, args.seed)
        fact_rows = np.stack([facts.row(args.length + 1) for _ in range(args.fact_pool)])
        print(f"{len(documents)} documents, {len(stream):,} tokens, {len(facts.names)} names; "
              f"data ready in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        bytes_per_token = (sum(len(d.encode()) for d in held) + len(held)) / len(held_out)
        asker = Facts(tokenizer, documents, held_out, args.seed + 1)
        return cls(tokenizer, stream, held_out, bytes_per_token, fact_rows, asker)


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.model = Llama(Shape()).to(self.device)
        self.data = Data.prepare(args, self.model.shape.vocab_size)
        self.plain_loss = Loss(self.model)
        compiled = self.device == "cuda" and not args.no_compile
        self.loss = torch.compile(self.plain_loss, dynamic=False) if compiled else self.plain_loss
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=args.learning_rate, betas=(0.9, 0.95), fused=self.device == "cuda",
        )  # fmt: skip
        fact_rows = round(args.rows * args.fact_share)
        self.batches = Batches(
            self.data.stream, self.data.fact_rows, args.rows - fact_rows, fact_rows, args.seed, self.device
        )
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")
        self.record = Record(
            parameters=sum(p.numel() for p in self.model.parameters()),
            data_sha256=hashlib.sha256(args.text.read_bytes()).hexdigest(),
            train_tokens=len(self.data.stream),
            seed=args.seed,
            rows=args.rows,
            length=args.length,
            fact_share=args.fact_share,
            learning_rate=args.learning_rate,
            warm_up=args.warm_up,
            device=torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            torch=torch.__version__,
        )

    def rate(self, step: int, steps: int | None) -> float:
        """A linear warm-up, then a cosine down to zero at `steps`."""
        warm = self.args.warm_up
        if steps is None or step < warm:
            return self.args.learning_rate * min(1.0, (step + 1) / warm)
        done = (step - warm) / max(1, steps - warm)
        return self.args.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def update(self, step: int, steps: int | None) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step, steps)
        with self.autocast:
            value = self.loss(self.batches.next())
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def probe(self, first: int, count: int) -> float:
        """Seconds a step, measured over real updates first to first + count."""
        began = self.clock()
        for step in range(first, first + count):
            self.update(step, None)
        return (self.clock() - began) / count

    def measure_and_save(self, step: int, seconds: float) -> None:
        args, record = self.args, self.record
        record.steps, record.seconds, record.tokens_seen = step, seconds, step * args.rows * args.length
        with self.autocast:
            loss = held_out_loss(self.plain_loss, self.data.held_out, args.length, args.rows, self.device)
            record.recall = {
                str(length): recall(self.model, self.data.asker, length, 20, self.device)
                for length in (256, 512, 1000)
                if length <= args.length
            }
        record.held_out_loss, record.held_out_perplexity = loss, math.exp(loss)
        record.held_out_bits_per_byte = loss / math.log(2) / self.data.bytes_per_token
        save(args.output, self.model, self.data.tokenizer, record)
        print(f"step {step}: held-out loss {loss:.4f}, perplexity {record.held_out_perplexity:.2f}, "
              f"recall {record.recall}", flush=True)  # fmt: skip

    def run(self) -> None:
        args, began = self.args, self.clock()
        # Compiling happens in the first steps; the next ones tell the speed, hence how many fit. They
        # are within the warm-up, so a run is repeated by passing the number it chose as --steps.
        warm, probe = (5, 20) if self.device == "cuda" else (1, 2)
        self.probe(0, warm)
        per_step = self.probe(warm, probe)
        steps = args.steps or warm + probe + int((args.minutes * 60 - self.clock() + began) / per_step)
        self.record.tokens_per_s, self.record.steps_planned = args.rows * args.length / per_step, steps
        print(f"{per_step * 1e3:.1f} ms a step, {self.record.tokens_per_s:,.0f} tokens/s, {steps} steps, "
              f"{steps * args.rows * args.length / 1e9:.3f} B tokens", flush=True)  # fmt: skip
        for step in range(warm + probe, steps):
            value = self.update(step, steps)
            if step % 100 == 0:
                print(f"step {step}: loss {float(value):.4f}, {self.clock() - began:.0f} s", flush=True)
            if step % args.save_every == 0:
                self.measure_and_save(step, self.clock() - began)
        self.measure_and_save(steps, self.clock() - began)
        print(json.dumps(asdict(self.record), indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text", type=Path, help="training text, plain or .xz")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, help="number of updates; repeats a run")
    parser.add_argument("--minutes", type=float, default=6.0, help="without --steps: train about this long")
    parser.add_argument("--rows", type=int, default=128, help="rows in a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--fact-share", type=float, default=0.125, help="share of rows with facts")
    parser.add_argument("--fact-pool", type=int, default=32768, help="how many rows with facts to make")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    parser.add_argument("--warm-up", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-mb", type=float, help="read only so much text, for a quick try")
    parser.add_argument("--save-every", type=int, default=2000, help="steps between measurements and saves")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    return parser.parse_args()


if __name__ == "__main__":
    Trainer(parse_arguments()).run()
