"""Networks for the tests of compaction: hand-made blocks, random stacks of them, and random damage."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Sigmoid, nn.Hardswish, nn.Identity, lambda: nn.LeakyReLU(0.1),
    lambda: nn.Dropout(0.5), nn.Softplus,
]  # fmt: skip


class Residual(nn.Module):
    """x + f(x), added in place, as ResNet does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out += x
        return torch.relu(out)


class Fire(nn.Module):
    """SqueezeNet's block: one squeeze, two expansions side by side."""

    def __init__(self, inputs: int, squeeze: int, left: int, right: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.left = nn.Conv2d(squeeze, left, 1)
        self.right = nn.Conv2d(squeeze, right, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.squeeze(x))
        return torch.cat([self.activation(self.left(x)), self.activation(self.right(x))], 1)


class Gate(nn.Module):
    """Squeeze and excitation: each channel times a number made from all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.up(torch.relu(self.down(self.pool(x))))) * x


class Head(nn.Module):
    """Features to classes; `how` is the way of flattening."""

    def __init__(self, features: int, spatial: int, how: str) -> None:
        super().__init__()
        self.size, self.how = features * spatial, how
        self.fc1, self.fc2 = nn.Linear(features if how == "mean" else self.size, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mean":
            x = x.mean([2, 3])
        elif self.how == "hard":
            x = x.view(-1, self.size)
        elif self.how == "size":
            x = x.reshape(x.size(0), -1)
        else:
            x = torch.flatten(x, 1)
        return self.fc2(torch.relu(self.fc1(x)))


def random_network(seed: int) -> nn.Module:
    """A network on (batch, 2, 9, 9), float64, evaluation mode, made and damaged by `seed`."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels, parts = 2, []
    for _ in range(draw.randint(1, 5)):
        block, channels = _block(draw, channels)
        parts.append(block)
        parts.append(draw.choice(ACTIVATIONS)())
    body = nn.Sequential(*parts).eval()
    with torch.no_grad():
        shape = body(torch.zeros(2, 2, 9, 9)).shape
    how = draw.choice(["mean", "hard", "size", "flatten"])
    network = nn.Sequential(body, Head(shape[1], shape[2] * shape[3], how)).double().eval()
    damage(network, seed)
    return network


def damage(network: nn.Module, seed: int) -> None:
    """Random biases and batch-norm statistics; single weights, whole rows and whole columns of weights at 0."""
    draw = torch.Generator().manual_seed(seed)

    def hit(count: int, chance: float) -> Tensor:
        return torch.rand(count, generator=draw) < chance

    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.weight[torch.rand(part.weight.shape, generator=draw) < 0.5] = 0
                part.weight[hit(len(part.weight), 0.3)] = 0
                part.weight[:, hit(part.weight.shape[1], 0.3)] = 0
                if part.bias is not None:
                    part.bias.copy_(torch.randn(part.bias.shape, generator=draw))
                    part.bias[hit(len(part.bias), 0.3)] = 0
            if isinstance(part, nn.MultiheadAttention):
                part.in_proj_weight[torch.rand(part.in_proj_weight.shape, generator=draw) < 0.5] = 0
                part.in_proj_weight[hit(len(part.in_proj_weight), 0.3)] = 0
                part.in_proj_bias.copy_(torch.randn(part.in_proj_bias.shape, generator=draw))
                for head in hit(part.num_heads, 0.3).nonzero().flatten() * part.head_dim:
                    part.out_proj.weight[:, head : head + part.head_dim] = 0
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=draw))
                part.running_var.copy_(torch.rand(part.running_var.shape, generator=draw) + 0.5)
                part.weight[hit(len(part.weight), 0.2)] = 0
                part.bias.copy_(torch.randn(part.bias.shape, generator=draw))
                part.bias[hit(len(part.bias), 0.3)] = 0


def _block(draw: random.Random, channels: int) -> tuple[nn.Module, int]:
    kind = draw.choice(["conv", "conv", "norm", "residual", "fire", "depthwise", "grouped", "gate", "pool", "prelu"])
    out = draw.randint(1, 6)
    if kind == "conv":
        kernel = draw.choice([1, 3])
        mode = draw.choice(["zeros", "zeros", "reflect"])
        padding = draw.choice([0, 1]) if kernel == 3 else 0
        return nn.Conv2d(channels, out, kernel, padding=1 if mode == "reflect" else padding, padding_mode=mode), out
    if kind == "norm":
        conv = nn.Conv2d(channels, out, 1, bias=draw.random() < 0.5)
        return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()), out
    if kind == "residual":
        inner = nn.Sequential(nn.Conv2d(channels, out, 1), nn.ReLU(), nn.Conv2d(out, channels, 3, padding=1))
        return Residual(inner), channels
    if kind == "fire":
        return Fire(channels, draw.randint(1, 3), out, 2), out + 2
    if kind == "depthwise":
        times, padding = draw.randint(1, 2), draw.choice([0, 1])
        layers = nn.Sequential(
            nn.Conv2d(channels, channels * times, 3, padding=1, groups=channels, bias=padding == 1),
            nn.BatchNorm2d(channels * times),
        )
        return layers, channels * times
    if kind == "grouped":
        layers = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, groups=2))
        return layers, 6
    if kind == "gate":
        return Gate(channels), channels
    if kind == "prelu":
        return nn.PReLU(channels), channels
    pools: list[nn.Module] = [
        nn.MaxPool2d(2, stride=1, padding=1), nn.MaxPool2d(2, stride=1), nn.AvgPool2d(2, stride=1, padding=1),
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), nn.AvgPool2d(2, stride=1, ceil_mode=True),
    ]  # fmt: skip
    return draw.choice(pools), channels


class Attending(nn.Module):
    """Images (batch, 1, 8, 8) to 16 patches of `width` numbers, attention among them, and 10 classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, 2)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(patches, patches, patches, need_weights=False)
        logits: Tensor = self.head((patches + mixed).mean(1))
        return logits


class Encoding(nn.Module):
    """As Attending, with a whole encoder layer, which takes a fused path in evaluation mode."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, 2)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1))
        return logits


FORMS = ("timm", "products", "normed", "views", "chunks", "masked", "causal")  # of Attention
OPEN_FORMS = ("chunks", "causal")  # whose code names no number that a head less would change


class Attention(nn.Module):
    """Attention of (batch, tokens, width) to itself, as networks spell it out.

    `masked` takes 5 tokens, and `counted` multiplies by the number of heads.
    """

    def __init__(self, width: int, heads: int, form: str) -> None:
        super().__init__()
        self.heads, self.size, self.form = heads, width // heads, form
        if form == "views":
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.size) if form == "normed" else nn.Identity()
        self.drop, self.out = nn.Dropout(0.1), nn.Linear(width, width)
        self.mask = nn.Buffer(torch.ones(5, 5).tril() > 0) if form == "masked" else None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        attend = nn.functional.scaled_dot_product_attention
        if self.form == "views":  # as in Hugging Face's networks
            shape = (batch, -1, self.heads, self.size)
            q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
            mixed = self.drop(torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1)) @ v
            logits: Tensor = self.out(mixed.permute(0, 2, 1, 3).contiguous().view(batch, tokens, width))
            return logits
        if self.form in ("chunks", "causal"):  # with no number that a head less would change
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (part.unflatten(2, (-1, self.size)).transpose(1, 2) for part in (q, k, v))
            mixed = attend(q, k, v, is_causal=self.form == "causal")
            return self.out(mixed.transpose(1, 2).flatten(2))
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if self.form != "products" else (qkv[0], qkv[1], qkv[2])
        q = self.q_norm(q)
        if self.form == "products":
            mixed = self.drop((q * self.size**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        else:
            mixed = attend(q, k, v, attn_mask=self.mask, dropout_p=self.drop.p if self.training else 0.0)
            mixed = mixed * qkv.shape[2] if self.form == "counted" else mixed
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class ThereAndBack(nn.Module):
    """A layer, and then its weight transposed, outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 16), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(torch.relu(nn.functional.linear(hidden, self.fc1.weight.t())))
        return logits


class Rows(nn.Module):
    """Linear layers on (batch, rows, numbers)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x[:, 0]))).mean(1)


class ByName(nn.Module):
    """Every layer is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc2(input=self.act(input=self.fc1(input=x.flatten(1))))
        return logits


class Mixed(nn.Module):
    """The first product is by a weight computed from two layers' weights, neither of which is called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 16), nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x.flatten(1), self.one.weight + self.two.weight)
        logits: Tensor = self.head(torch.relu(hidden))
        return logits


class OnTokens(nn.Module):
    """A block of a transformer without its attention: x + f(norm(x)) on (batch, tokens, features)."""

    def __init__(self, features: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = nn.LayerNorm(features), activation
        self.wide, self.narrow = nn.Linear(features, hidden), nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.activation(self.wide(self.norm(x))))


class Patches(nn.Module):
    """A small network on patches, (batch, 2, 9, 9): a convolution, attention, blocks on tokens, classes.

    `form` is of Attention, or "torch" for torch's own module.
    """

    def __init__(self, hidden: Sequence[int], activation: Callable[[], nn.Module], form: str = "torch") -> None:
        super().__init__()
        self.patches, self.form = nn.Conv2d(2, 6, 3, 3), form
        own = nn.MultiheadAttention(6, 3, batch_first=True) if form == "torch" else None
        self.attention = own or Attention(6, 3, form)
        self.blocks = nn.Sequential(*(OnTokens(6, size, activation()) for size in hidden))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + (self.attention(x, x, x, need_weights=False)[0] if self.form == "torch" else self.attention(x))
        return self.head(self.blocks(x).mean(1))


def random_patches(seed: int, forms: Sequence[str] = FORMS) -> nn.Module:
    """A network on patches, float64, evaluation mode, made and damaged by `seed`; of attention in `forms`."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    hidden = [draw.randint(1, 8) for _ in range(draw.randint(1, 3))]
    form = draw.choice(["torch", "torch", *(form for form in forms if form != "masked")])
    network = Patches(hidden, draw.choice(ACTIVATIONS), form).double().eval()
    damage(network, seed)
    return network
