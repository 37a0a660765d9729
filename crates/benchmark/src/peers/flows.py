# Flows: solvers, adjoints, samplers, a training step and an iteration of distillation.


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


@operation("scipy solve_ivp RK45")
def solve_ivp(spec):
    import numpy
    from scipy.integrate import solve_ivp

    shape, x = spec["shape"], start(spec).double().numpy().ravel()
    centers, variance = numpy.array(spec["centers"]), spec["variance"]
    norms = (centers**2).sum(1)

    def field(t, flat):
        x, rest = flat.reshape(shape), 1 - t
        total = t * t * variance + rest * rest
        logits = (t * (x @ centers.T) - 0.5 * t * t * norms) / total
        weights = numpy.exp(logits - logits.max(1, keepdims=True))
        mean = weights @ centers / weights.sum(1, keepdims=True)
        return (mean + (t * variance - rest) / total * (x - t * mean)).ravel()

    def run():
        solve_ivp(field, (0.0, 1.0), x, rtol=1e-5, atol=1e-5)

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


def through_steps(name, checkpoint):
    def prepare(spec):
        from torch.utils.checkpoint import checkpoint as again

        field, times = MixtureNoise(spec), spec["rho"]
        start_y = (start(spec) * spec["rho"][0]).requires_grad_()

        def step(y, a, b):
            h = b - a
            return y + h * field(a + 0.5 * h, y + 0.5 * h * field(a, y))

        def run():
            start_y.grad = None
            y = start_y
            for a, b in zip(times, times[1:]):
                y = again(step, y, a, b, use_reentrant=False) if checkpoint else step(y, a, b)
            y.square().sum().backward()

        return run

    operation(name)(prepare)


through_steps("torch autograd through all steps", False)
through_steps("torch checkpoint of each step", True)


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


def perceptron(widths):
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:])):
        layers += [torch.nn.Linear(a, b)] + ([torch.nn.SiLU()] if i + 2 < len(widths) else [])
    return torch.nn.Sequential(*layers)


def flow_step(name, between):
    """A step on `between(x0, x1, t)`, which gives the sample and its velocity."""

    def prepare(spec):
        widths, rows, make = spec["widths"], spec["rows"], between()
        net, d = perceptron(widths), widths[-1]
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        x1 = torch.randn(rows, d)

        def run():
            x0, t = torch.randn(rows, d), torch.rand(rows)
            x, velocity = make(x0, x1, t)
            v = net(torch.cat([x, t[:, None]], 1))
            optimizer.zero_grad(set_to_none=True)
            (v - velocity).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

        return run

    operation(name)(prepare)


def straight():
    return lambda x0, x1, t: (t[:, None] * x1 + (1 - t[:, None]) * x0, x1 - x0)


def probability_path():
    from flow_matching.path import CondOTProbPath

    path = CondOTProbPath()

    def between(x0, x1, t):
        sample = path.sample(t=t, x_0=x0, x_1=x1)
        return sample.x_t, sample.dx_t

    return between


flow_step("torch flow training step", straight)
flow_step("flow_matching training step", probability_path)


@operation("torch distribution matching")
def matching(spec):
    rows, d, sd = spec["rows"], spec["d"], spec["sigma_data"]
    nets = [perceptron([d + 9, 256, 256, 256, d]) for _ in range(3)]
    student, fake, target = nets
    sigmas, (low, high) = torch.tensor(spec["levels"]), spec["range"]
    make = lambda net, lr: torch.optim.AdamW(
        net.parameters(), lr=lr, betas=(0.0, 0.99), weight_decay=0.0, fused=True
    )
    optimizers = [make(net, lr) for net, lr in zip(nets, spec["lr"])]

    def denoise(net, x, sigma):
        c = sigma.log() / 4
        features = [c]
        for k in [1.0, 2.0, 4.0, 8.0]:
            features += [(k * c).sin(), (k * c).cos()]
        total = sigma.square() + sd * sd
        raw = net(torch.cat([x * total.rsqrt()] + features, 1))
        return sd * sd / total * x + sigma * sd * total.rsqrt() * raw

    def update(net, optimizer, loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), spec["clip"])
        # Ours reports both, and refuses what is not finite.
        assert loss.isfinite() and norm.isfinite()
        optimizer.step()

    def iteration():
        x = denoise(student, spec["student_sigma"] * torch.randn(rows, d), start_sigma)
        with torch.no_grad():
            sigma = sigmas[torch.randint(low, high + 1, (rows, 1))]
            noisy = x + sigma * torch.randn(rows, d)
            real = denoise(target, noisy, sigma)
            g = (denoise(fake, noisy, sigma) - real) / (x - real).abs().mean(1, keepdim=True)
        update(student, optimizers[0], (x * g).mean())
        x = x.detach()
        sigma = sigmas[torch.randint(0, len(sigmas), (rows, 1))]
        off = denoise(fake, x + sigma * torch.randn(rows, d), sigma) - x
        update(fake, optimizers[1], ((sigma**-2 + sd**-2) * off.square()).mean())

    start_sigma = torch.full((rows, 1), spec["student_sigma"])

    def run():
        for _ in range(10):
            iteration()

    return run
