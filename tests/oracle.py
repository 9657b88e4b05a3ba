"""The truth: retention token by token in float64, straight from the definition. Imports nothing of the library.

out_n = scale * sum over m of gamma^|t_n - t_m| (q_n . k_m) v_m     m <= n if causal, own sequence only
On a grid |t_n - t_m| is the distance in rows plus that in columns.
"""

from itertools import pairwise

import torch


def retain(
    q,
    k,
    v,
    log_decay,
    *,
    scale=None,
    mask=None,
    cu_seqlens=None,
    causal=True,
    grid=None,
    decay_norm=False,
    score_norm=False,
):
    q, k, v, gamma = q.double(), k.double(), v.double(), log_decay.double().exp()
    batch, heads, length, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=torch.float64, device=q.device)
    for b in range(batch):
        for tokens in sequences(b, length, mask, cu_seqlens):
            for h in range(heads):
                kv_head = h // (heads // k.shape[1])
                for n, token in enumerate(tokens):
                    seen = range(n + 1) if causal else range(len(tokens))
                    decay = torch.stack([gamma[h] ** distance(n, m, grid) for m in seen])
                    if decay_norm:
                        decay = decay / decay.sum().sqrt()
                    other = [tokens[m] for m in seen]
                    score = scale * (k[b, kv_head, other] @ q[b, h, token]) * decay
                    if score_norm == "absolute":
                        score = score / score.abs().sum().detach().clamp(1, 5e4)
                    elif score_norm:
                        score = score / score.sum().abs().clamp(min=1)
                    out[b, h, token] = score @ v[b, kv_head, other]
    return out


def distance(n, m, grid):
    if grid is None:
        return abs(n - m)
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    return abs(cells[n][0] - cells[m][0]) + abs(cells[n][1] - cells[m][1])


def sequences(b, length, mask, cu_seqlens):
    """The tokens of each sequence that row b holds."""
    if cu_seqlens is not None:
        borders = cu_seqlens.tolist()
        return [list(range(start, end)) for start, end in pairwise(borders)]
    return [[t for t in range(length) if mask is None or mask[b, t]]]


def state(k, v, log_decay, heads):
    """sum over m of gamma^(t - m) k_m v_m^T after the last token of each row, all tokens real."""
    k, v = (x.double().repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    kv = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=torch.float64)
    for t in range(k.shape[2]):
        kv = log_decay.double().exp()[:, None, None] * kv + k[:, :, t, :, None] * v[:, :, t, None, :]
    return kv
