"""A byte-level language model on FlashMHA: trains on real text, then writes some.

The text is the source of Python's standard library, several megabytes that every machine has. A
decoder of four layers is trained for about a minute on two cores; its loss, in nats a byte, starts
near log(256) = 5.5 and has to end below `--target`. The loss curve is saved as a picture. Then the
model continues a prompt byte by byte through `flash_attn_with_kvcache`, which FlashMHA calls
when it is given inference parameters.

    python examples/language_model.py              # train and write
    python examples/language_model.py --compare    # the same model with torch's own attention too
"""

import argparse
import math
import pathlib
import sys
import sysconfig
import time

import torch
import torch.nn.functional as F
from torch import nn

from flash_attn.modules.mha import FlashMHA
from flash_attn.utils.generation import InferenceParams


class SdpaMHA(nn.Module):
    """The parameters of FlashMHA with torch's scaled_dot_product_attention, for comparison."""

    def __init__(self, embed_dim, num_heads, causal=False, layer_idx=None):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x, inference_params=None):
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention, dim, num_heads, layer_idx):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = attention(dim, num_heads, causal=True, layer_idx=layer_idx)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, inference_params=None):
        x = x + self.attention(self.norm1(x), inference_params=inference_params)
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Bytes (b, s) to logits (b, s, 256); learned positions; input and output embedding are one."""

    def __init__(self, attention, dim=192, num_layers=4, num_heads=3, context=256):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(256, dim)
        self.position = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(attention, dim, num_heads, i) for i in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last_of_branch = name.endswith(("out_proj.weight", "mlp.2.weight"))
                scale = 0.02 / math.sqrt(2 * num_layers) if last_of_branch else 0.02
                nn.init.normal_(parameter, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, inference_params=None):
        first = inference_params.seqlen_offset if inference_params is not None else 0
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x, inference_params)
        return self.norm(x) @ self.embedding.weight.T


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by a Newton-Schulz iteration, for matrices (Jordan et al., 2024).

    In as many steps as this example takes, AdamW alone ends a quarter of a nat higher.
    """

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = self.orthogonal(matrix.grad.lerp(average, group["momentum"]))
                scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=group["lr"] * scale)

    @staticmethod
    def orthogonal(matrix):
        """Nearly U V^T of the singular value decomposition U S V^T."""
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x.T if tall else x


def standard_library_text():
    """The top-level modules of the standard library as one tensor of bytes, 0 between files."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"\0".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def train(attention, text, args):
    """Trains a new model; returns it with its losses, one a step, and the seconds that it took."""
    torch.manual_seed(args.seed)
    model = LanguageModel(attention).to(args.device)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95))]
    warmup = max(1, args.steps // 10)

    def rate(step):
        decay = 0.5 * (1 + math.cos(math.pi * min(1, step / args.steps)))
        return min(1, (step + 1) / warmup) * (0.05 + 0.95 * decay)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    generator = torch.Generator().manual_seed(args.seed)
    window = torch.arange(model.context + 1)
    losses, start = [], time.perf_counter()
    for _ in range(args.steps):
        first = torch.randint(len(text) - model.context, (args.batch, 1), generator=generator)
        tokens = text[first + window].to(args.device, torch.long)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        losses.append(loss.item())
        progress(attention.__name__, losses, args.steps, time.perf_counter() - start)
    return model, losses, time.perf_counter() - start


def progress(name, losses, steps, seconds):
    """A bar that redraws itself on a terminal, ten lines elsewhere."""
    step, terminal = len(losses), sys.stdout.isatty()
    if not terminal and step % max(1, steps // 10) and step != steps:
        return
    bar = "#" * (24 * step // steps)
    left = seconds / step * (steps - step)
    line = f"{name:8} [{bar:.<24}] {step:4d}/{steps}  loss {losses[-1]:.3f}  {left:3.0f} s left"
    end = "\n" if step == steps or not terminal else ""
    print("\r" + line if terminal else line, end=end, flush=True)


def final_loss(losses):
    """Mean over the last tenth of the steps: one batch alone is noisy by about 0.1."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


@torch.no_grad()
def generate(model, prompt, args, temperature=0.8):
    """Continues the prompt to the model's context.

    Keys and values of what was written are kept: each step computes one row.
    """
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    tokens = torch.frombuffer(bytearray(prompt), dtype=torch.uint8).to(args.device, torch.long)[
        None
    ]
    inference_params = InferenceParams(max_seqlen=model.context, max_batch_size=1)
    written = bytearray(prompt)
    while len(written) < model.context:
        logits = model(tokens, inference_params=inference_params)[0, -1].float().cpu()
        inference_params.seqlen_offset += tokens.shape[1]
        probabilities = torch.softmax(logits / temperature, dim=-1)
        tokens = torch.multinomial(probabilities, 1, generator=generator)[None].to(args.device)
        written.append(tokens.item())
    return bytes(written)


def plot(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in curves.items():
        label = f"{name}, ends at {final_loss(losses):.3f}"
        axes.plot(range(1, len(losses) + 1), losses, label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title="Byte-level language model")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", choices=["flash", "sdpa"], default="flash")
    parser.add_argument("--compare", action="store_true", help="train with both, compare losses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 bytes a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=2.2, help="loss that must be reached")
    parser.add_argument("--plot", type=pathlib.Path, help="where to save the loss curve (PNG)")
    parser.add_argument("--prompt", default="    def __init__(self, ")
    args = parser.parse_args()

    text = standard_library_text()
    kinds = {"flash": FlashMHA, "sdpa": SdpaMHA}
    print(f"Training on {len(text) / 1e6:.1f} MB of Python, {args.batch} x 256 bytes a step")
    models, curves = {}, {}
    for name in kinds if args.compare else [args.attention]:
        models[name], curves[name], seconds = train(kinds[name], text, args)
        last = final_loss(curves[name])
        print(f"Loss {curves[name][0]:.3f} -> {last:.3f} in {seconds:.0f} s, target {args.target}")
    if args.plot is not None:
        plot({kinds[name].__name__: losses for name, losses in curves.items()}, args.plot)
        print(f"Loss curve: {args.plot}")
    if "flash" in models:
        start = time.perf_counter()
        written = generate(models["flash"], args.prompt.encode(), args)
        rate = (len(written) - len(args.prompt)) / (time.perf_counter() - start)
        print(f"\nWritten through flash_attn_with_kvcache, {rate:.0f} bytes/s:\n")
        print(written.decode(errors="replace"))
    if args.compare:
        difference = abs(final_loss(curves["flash"]) - final_loss(curves["sdpa"]))
        print(f"\nThe final losses differ by {difference:.4f}")
        if difference > 0.05:
            sys.exit("The two attentions do not reach the same loss.")
    if any(final_loss(losses) > args.target for losses in curves.values()):
        sys.exit(f"The loss did not fall below {args.target}.")


if __name__ == "__main__":
    main()
