"""The human view: a few-step diffusion restorer around the machine estimate.

The machine view is the mean of what a picture may be, given a state; it lacks what the state does not
determine. The restorer samples that residual. Its forward process shifts from the true residual to
pure noise around the machine estimate (residual shifting, Yue et al. 2023, arXiv:2307.12348):

    r_t = (1 - t) r_0 + sqrt(t) n,   t from 0 to 1,  n ~ N(0, 1),

in units of the residual's standard deviation for each channel and state. So a state of the stream *is*
the starting point of the diffusion, and one network serves all states. The network predicts ``r_0``;
the sampler takes one to four evaluations. Every picture it makes is generated, and is marked so.

Noise is addressed by stream, evaluation and place (:mod:`.noise`): a window of a picture gets the
noise of the whole, on any machine. Its normal table travels in the checkpoint.

Shape suffixes: B images, C channels of z, h w the 1/8 grid, E embedding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicmh_ray.codec.noise import normal_table
from dicmh_ray.codec.transform import Block

EMBEDDING = 64
NORMAL_LEVELS = 4096


class Conditioning(nn.Module):
    """Diffusion time, state and tags of each image -> one vector."""

    def __init__(self, num_states: int, num_words: int) -> None:
        super().__init__()
        self.state = nn.Embedding(num_states, EMBEDDING)
        self.words = nn.Parameter(torch.zeros(num_words, EMBEDDING))
        self.time = nn.Sequential(
            nn.Linear(16, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING)
        )

    def forward(self, time_B: Tensor, state_B: Tensor, word_BN: Tensor) -> Tensor:
        """``word_BN``: float, 1 for each word of the vocabulary an image is tagged with."""
        octaves = 2.0 ** torch.arange(8, device=time_B.device) * (math.pi / 8)
        phase = time_B[:, None] * octaves
        vector_BE: Tensor = self.state(state_B) + self.time(
            torch.cat([phase.sin(), phase.cos()], 1)
        )
        count = word_BN.sum(1, keepdim=True).clamp_min(1)
        return vector_BE + (word_BN @ self.words) / count


class ConditionedBlock(Block):
    """A bottleneck block whose narrow middle is scaled and shifted by the conditioning vector."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.modulate = nn.Linear(EMBEDDING, 2 * hidden)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def branch(self, x_BChw: Tensor, condition: Tensor | None) -> Tensor:
        hidden = self.conv(F.leaky_relu(self.reduce(x_BChw), 0.1, inplace=True))
        scale, shift = self.modulate(condition)[:, :, None, None].chunk(2, 1)
        hidden = F.leaky_relu(hidden * (1 + scale) + shift, 0.1, inplace=True)
        out: Tensor = self.expand(hidden)
        return out


class DiffusionRestorer(nn.Module):
    """Noisy residual and machine estimate -> estimate of the clean residual, at 1/8 and 1/16."""

    def __init__(
        self, *, channels: int, width: int, blocks: int, num_states: int, words: Sequence[str]
    ) -> None:
        super().__init__()
        self.words = tuple(words)
        self.channels = channels
        self.conditioning = Conditioning(num_states, len(words))
        self.enter = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.down = nn.Conv2d(4 * width, 2 * width, 1)
        self.up = nn.Conv2d(2 * width, 4 * width, 1)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        self.before = nn.ModuleList(ConditionedBlock(width, width) for _ in range(blocks))
        self.below = nn.ModuleList(ConditionedBlock(2 * width, width) for _ in range(blocks))
        self.after = nn.ModuleList(ConditionedBlock(width, width) for _ in range(blocks))
        for layer in (self.up, self.leave):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.spread: Tensor
        self.register_buffer("spread", torch.ones(num_states, channels))
        self.normals: Tensor
        self.register_buffer("normals", normal_table(NORMAL_LEVELS))

    def forward(
        self, noisy_BChw: Tensor, z_BChw: Tensor, time_B: Tensor, state_B: Tensor, word_BN: Tensor
    ) -> Tensor:
        """Clean residual in units of ``spread``, ``[B, C, h, w]``; h and w are even."""
        vector = self.conditioning(time_B, state_B, word_BN)
        x = self.enter(torch.cat([noisy_BChw, z_BChw], 1))
        for block in self.before:
            x = block(x, vector)
        low = self.down(F.pixel_unshuffle(x, 2))
        for block in self.below:
            low = block(low, vector)
        x = x + F.pixel_shuffle(self.up(low), 2)
        for block in self.after:
            x = block(x, vector)
        residual: Tensor = self.leave(x)
        return residual

    def sample(
        self, z_BChw: Tensor, state_B: Tensor, word_BN: Tensor, noise: Sequence[Tensor]
    ) -> Tensor:
        """Machine estimate -> human estimate of z, in ``len(noise)`` evaluations.

        Args:
            z_BChw: the machine estimate.
            state_B: int64, the state it was decoded from.
            word_BN: see :class:`Conditioning`.
            noise: standard normal ``[B, C, h, w]`` for each evaluation.
        """
        evaluations = len(noise)
        residual = torch.zeros_like(z_BChw)
        for i, normal in enumerate(noise):
            t = 1 - i / evaluations
            time_B = torch.full((len(z_BChw),), t, device=z_BChw.device)
            noisy = (1 - t) * residual + math.sqrt(t) * normal
            residual = self(noisy, z_BChw, time_B, state_B, word_BN)
        return z_BChw + residual * self.spread[state_B][:, :, None, None]

    def known_words(self, tags: Sequence[str]) -> Tensor:
        """Tags -> float ``[N]``; words outside the vocabulary are left out."""
        present = set(tags)
        return torch.tensor([float(word in present) for word in self.words])
