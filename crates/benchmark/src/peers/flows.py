# Flows: solvers, adjoints, samplers and a training step.


class MixtureVelocity(torch.nn.Module):
    """The velocity of straight paths from noise to equally likely Gaussians."""

    def __init__(self, spec):
        super().__init__()
        self.centers = torch.tensor(spec["centers"])
        self.norms = self.centers.square().sum(1)
        self.variance = spec["variance"]

    def forward(self, t, x):
        rest = 1 - t
        total = t * t * self.variance + rest * rest
        logits = (t * (x @ self.centers.T) - 0.5 * t * t * self.norms) / total
        mean = logits.softmax(1) @ self.centers
        return mean + (t * self.variance - rest) / total * (x - t * mean)


class MixtureNoise(torch.nn.Module):
    """The noise that the same mixture sees in x = alpha y, alpha = 1 / sqrt(1 + rho^2)."""

    def __init__(self, spec):
        super().__init__()
        self.centers = torch.tensor(spec["centers"])
        self.norms = self.centers.square().sum(1)
        self.variance = spec["variance"]

    def forward(self, rho, y):
        total = self.variance + rho * rho
        logits = (y @ self.centers.T - 0.5 * self.norms) / total
        mean = logits.softmax(1) @ self.centers
        clean = mean + self.variance / total * (y - mean)
        return (y - clean) / rho


def start(spec):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(spec["shape"], generator=generator)


@operation("torchdiffeq dopri5")
def dopri5(spec):
    from torchdiffeq import odeint

    field, x, times = MixtureVelocity(spec), start(spec), torch.tensor([0.0, 1.0])

    @torch.no_grad()
    def run():
        odeint(field, x, times, rtol=1e-5, atol=1e-5, method="dopri5")

    return run


@operation("torchdiffeq euler")
def euler(spec):
    from torchdiffeq import odeint

    field, x = MixtureVelocity(spec), start(spec)
    times = torch.tensor([0.0, 1.0])
    options = {"step_size": 1.0 / spec["steps"]}

    @torch.no_grad()
    def run():
        odeint(field, x, times, method="euler", options=options)

    return run


@operation("torchdiffeq odeint_adjoint midpoint")
def adjoint(spec):
    from torchdiffeq import odeint_adjoint

    field, times = MixtureNoise(spec), torch.tensor(spec["rho"])
    y = (start(spec) * spec["rho"][0]).requires_grad_()

    def run():
        y.grad = None
        odeint_adjoint(field, y, times, method="midpoint", adjoint_params=())[-1].square().sum().backward()

    return run


@operation("torch autograd through all steps")
def through_steps(spec):
    field, times = MixtureNoise(spec), spec["rho"]
    start_y = (start(spec) * spec["rho"][0]).requires_grad_()

    def run():
        start_y.grad = None
        y = start_y
        for a, b in zip(times, times[1:]):
            h = b - a
            y = y + h * field(a + 0.5 * h, y + 0.5 * h * field(a, y))
        y.square().sum().backward()

    return run


def scheduler(name, make):
    """The loop of a sampler around a denoiser that costs one multiplication."""

    def prepare(spec):
        x0 = start(spec)

        @torch.no_grad()
        def run():
            steps, x = make(), x0
            steps.set_timesteps(spec["steps"])
            for t in steps.timesteps:
                x = steps.step(x * 0.1, t, x).prev_sample

        return run

    operation(name)(prepare)


def stable_diffusion(kind, **settings):
    import diffusers

    return getattr(diffusers, kind)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings
    )


scheduler("diffusers DDIM", lambda: stable_diffusion("DDIMScheduler", clip_sample=False))
scheduler("diffusers DPM-Solver++ 2M", lambda: stable_diffusion("DPMSolverMultistepScheduler"))


@operation("torch flow training step")
def flow_step(spec):
    widths = spec["widths"]
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:])):
        layers.append(torch.nn.Linear(a, b))
        if i + 2 < len(widths):
            layers.append(torch.nn.SiLU())
    net = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    rows, d = spec["rows"], widths[-1]
    x1 = torch.randn(rows, d)

    def run():
        x0, t = torch.randn(rows, d), torch.rand(rows, 1)
        x = t * x1 + (1 - t) * x0
        v = net(torch.cat([x, t], 1))
        optimizer.zero_grad(set_to_none=True)
        (v - (x1 - x0)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return run
