# GFlowNets, masked diffusion, hypervolumes.


@operation("torch GFlowNet")
def gflownet(spec):
    import torch

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


@operation("torch masked diffusion")
def masked_diffusion(spec):
    import torch

    width, vocab, length, batch = 64, 4, 100, 16

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

    net = torch.nn.Sequential(
        torch.nn.Conv1d(vocab + 1, width, 9, padding=4),
        torch.nn.ReLU(),
        *[Block(d) for d in (1, 1, 4, 4)],
        torch.nn.Conv1d(width, width, 1),
        torch.nn.ReLU(),
        torch.nn.Conv1d(width, vocab + 1, 1),
    )

    def law(x):
        one_hot = torch.nn.functional.one_hot(x, vocab + 1).float().transpose(1, 2)
        logits = net(one_hot).transpose(1, 2)
        logits[..., vocab] = -1e6
        return logits.softmax(-1)

    @torch.no_grad()
    def run():
        x = torch.full((batch, length), vocab)
        steps = spec["steps"]
        for i in range(steps):
            a, s = 1 - i / steps, 1 - (i + 1) / steps
            q = law(x) * (a - s)
            q[..., vocab] = s
            noise = 1e-10 - (torch.rand_like(q) + 1e-10).log()
            x = torch.where(x == vocab, (q / noise).argmax(-1), x)
        p = law(x)
        x = torch.where(x == vocab, p.argmax(-1), x)

    return run
