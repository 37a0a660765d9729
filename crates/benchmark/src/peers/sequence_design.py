# GFlowNets, masked diffusion, offline design, hypervolumes.

import math


@operation("torch GFlowNet")
def gflownet(spec):
    ndim, side, batch = 4, 8, spec["batch"]
    actions = ndim + 1

    def network(outputs):
        return torch.nn.Sequential(
            torch.nn.Linear(ndim * side, 256),
            torch.nn.ReLU(),
            torch.nn.Linear(256, 256),
            torch.nn.ReLU(),
            torch.nn.Linear(256, outputs),
        )

    # One trunk for both policies, as in ours.
    net = network(actions + ndim)
    log_z = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([*net.parameters(), log_z], lr=1e-3)

    def features(state):
        return torch.nn.functional.one_hot(state, side).float().flatten(1)

    def log_reward(state):
        away = (state / (side - 1) - 0.5).abs()
        outer = (away > 0.25).all(1)
        mode = ((away > 0.3) & (away < 0.4)).all(1)
        return (0.1 + 0.5 * outer + 2.0 * mode).log()

    def step():
        state = torch.zeros(batch, ndim, dtype=torch.long)
        total = torch.zeros(batch)
        open_ = torch.ones(batch, dtype=torch.bool)
        while open_.any():
            rows = open_.nonzero().squeeze(1)
            out = net(features(state[rows]))
            stop = torch.ones(len(rows), 1, dtype=torch.bool)
            allowed = torch.cat([state[rows] < side - 1, stop], 1)
            logits = out[:, :actions].masked_fill(~allowed, -1e30)
            law = torch.distributions.Categorical(logits=logits)
            action = law.sample()
            total = total.index_add(0, rows, law.log_prob(action))
            moves = action < ndim
            moved, taken = rows[moves], action[moves]
            open_[rows[~moves]] = False
            if len(moved):
                state[moved, taken] += 1
                back = net(features(state[moved]))[:, actions:]
                back = back.masked_fill(state[moved] == 0, -1e30).log_softmax(1)
                picked = back.gather(1, taken[:, None]).squeeze(1)
                total = total.index_add(0, moved, -picked)
        loss = (log_z + total - log_reward(state)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def run():
        for _ in range(spec["steps"]):
            step()

    return run


@operation("pymoo")
def moo_hypervolume(spec):
    import numpy as np
    from pymoo.indicators.hv import HV

    points = -np.array(spec["points"])
    indicator = HV(ref_point=np.zeros(points.shape[1]))
    return lambda: indicator(points)


VOCAB, LENGTH = 4, 100


def unmasking_net():
    width = 64

    class Block(torch.nn.Module):
        def __init__(self, dilation):
            super().__init__()
            self.norm = torch.nn.LayerNorm(width)
            self.conv = torch.nn.Conv1d(
                width, width, 9, padding=4 * dilation, dilation=dilation
            )

        def forward(self, x):
            h = self.norm(x.transpose(1, 2)).transpose(1, 2)
            return x + torch.relu(self.conv(h))

    return torch.nn.Sequential(
        torch.nn.Conv1d(VOCAB + 1, width, 9, padding=4),
        torch.nn.ReLU(),
        *[Block(d) for d in (1, 1, 4, 4)],
        torch.nn.Conv1d(width, width, 1),
        torch.nn.ReLU(),
        torch.nn.Conv1d(width, VOCAB + 1, 1),
    )


def grid(steps):
    times = torch.linspace(1, 1e-5, steps + 1).tolist()
    return list(zip(times[:-1], times[1:]))


def hot(tokens):
    return torch.nn.functional.one_hot(tokens, VOCAB + 1).float()


def log_law(net, x):
    """The log-probabilities of clean tokens, certain where x is not masked."""
    z = net(x.transpose(1, 2)).transpose(1, 2)
    z = torch.cat([z[..., :VOCAB], z[..., VOCAB:] - 1e6], -1).log_softmax(-1)
    here = x.argmax(-1)
    certain = (hot(here) - 1) * 1e6
    return torch.where((here == VOCAB)[..., None], z, certain)


def drawn(tokens, p, a, s):
    q = torch.cat([p[..., :VOCAB] * (a - s), torch.full_like(p[..., :1], s)], -1)
    noise = 1e-10 - (torch.rand_like(q) + 1e-10).log()
    return torch.where(tokens == VOCAB, (q / noise).argmax(-1), tokens)


@operation("torch masked diffusion")
def masked_diffusion(spec):
    net, batch = unmasking_net(), 16

    @torch.no_grad()
    def run():
        x = torch.full((batch, LENGTH), VOCAB)
        for a, s in grid(spec["steps"]):
            x = drawn(x, log_law(net, hot(x)).exp(), a, s)
        filled = log_law(net, hot(x))[..., :VOCAB].argmax(-1)
        torch.where(x == VOCAB, filled, x)

    return run


@operation("torch DRAKES")
def drakes(spec):
    import copy

    net, batch, soft = unmasking_net(), spec["batch"], spec["soft"]
    old = copy.deepcopy(net).requires_grad_(False)
    weights = torch.randn(LENGTH, VOCAB)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)

    def run():
        x = hot(torch.full((batch, LENGTH), VOCAB))
        steps = grid(spec["steps"])
        kl = torch.zeros(batch)
        for i, (a, s) in enumerate(steps):
            log_p = log_law(net, x)
            log_old = log_law(old, x)
            p = log_p.exp()
            gap = (p * (log_p - log_old)).sum(-1)
            kl = kl + (a - s) / a * (x[..., VOCAB] * gap).sum(1)
            if i < len(steps) - soft:
                x = hot(drawn(x.argmax(-1), p.detach(), a, s))
                continue
            scores = torch.cat(
                [
                    log_p[..., :VOCAB] + math.log(a - s),
                    torch.full_like(p[..., :1], math.log(s)),
                ],
                -1,
            )
            noise = -(1e-10 - (torch.rand_like(scores) + 1e-10).log()).log()
            copied = 1 - x[..., VOCAB:]
            x = copied * x + (1 - copied) * (scores + noise).softmax(-1)
        out = x[..., :VOCAB]
        hard = torch.nn.functional.one_hot(out.argmax(-1), VOCAB) - out.detach() + out
        loss = (0.001 * kl - (hard * weights).sum((1, 2))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return run


@operation("torch SVDD")
def svdd(spec):
    net, batch, m = unmasking_net(), spec["batch"], spec["candidates"]
    weights = torch.randn(LENGTH, VOCAB)

    @torch.no_grad()
    def run():
        x = torch.full((batch, LENGTH), VOCAB)
        p = log_law(net, hot(x)).exp()
        for a, s in grid(spec["steps"]):
            many = x.repeat_interleave(m, 0)
            many = drawn(many, p.repeat_interleave(m, 0), a, s)
            law = log_law(net, hot(many)).exp()
            clean = torch.where(many == VOCAB, law[..., :VOCAB].argmax(-1), many)
            reward = (hot(clean)[..., :VOCAB] * weights).sum((1, 2)).view(batch, m)
            rows = torch.arange(batch) * m + reward.argmax(1)
            x, p = many[rows], law[rows]
        torch.where(x == VOCAB, p[..., :VOCAB].argmax(-1), x)

    return run


@operation("torch BIB")
def bib(spec):
    starts, rows, width, tokens = spec["starts"], spec["rows"], 64, 6
    layer = torch.nn.TransformerEncoderLayer(
        width, 4, 128, dropout=0.0, activation="gelu", batch_first=True
    )
    net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = net.double().requires_grad_(False)
    embed, places = torch.randn(64, width).double(), torch.randn(tokens, width).double()
    phi = torch.randn(rows, width).double()
    y, w, score = (torch.randn(n).double() for n in (rows, width, width))
    gram, cross, square = phi.T @ phi / rows, phi.T @ y / rows, (y * y).mean()
    target = 10.0

    def adam(moments, g, t):
        m, v = moments
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        return m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    def run():
        x = 0.01 * torch.randn(starts, 8, 4).double()
        moments = torch.zeros_like(x), torch.zeros_like(x)
        gammas = torch.zeros(starts).double(), torch.zeros(starts).double()
        gamma = torch.full((starts,), 0.5).double()
        for t in range(1, spec["steps"] + 1):
            x.requires_grad_(True)
            p = x.softmax(-1)
            token = p[:, :-2, :, None, None] * p[:, 1:-1, None, :, None]
            token = (token * p[:, 2:, None, None, :]).flatten(2)
            hard = torch.nn.functional.one_hot(token.argmax(-1), 64)
            f = net((hard - token.detach() + token) @ embed + places).mean(1)
            k = (f * f).sum(1)
            s = target / (1 + 1e-6)
            forward = (f @ w - target).square().sum()
            backward = (
                s * s / k**2 * ((f @ gram) * f).sum(1)
                - 2 * s / k * (f @ cross)
                + square
            ).sum()
            gf, gb, gs = (
                torch.autograd.grad(l, x, retain_graph=True)[0]
                for l in (forward, backward, (f @ score).sum())
            )
            along = 0.1 * (gs * (gf - gb)).sum((1, 2))
            gamma = (gamma - 0.1 * adam(gammas, along, t)).clamp(0, 1)
            mix = gamma[:, None, None]
            x = x.detach() - 0.1 * adam(moments, mix * gf + (1 - mix) * gb, t)

    return run
