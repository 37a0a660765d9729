# Guidance: combinations of two predictions, and noise that is optimized for a reward.


def two_predictions(spec):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(spec["shape"], generator=generator) for _ in range(2)]


@operation("diffusers ClassifierFreeGuidance")
def classifier_free(spec):
    from diffusers.guiders import ClassifierFreeGuidance

    rule = ClassifierFreeGuidance(guidance_scale=spec["scale"], guidance_rescale=spec["rescale"])
    wanted, unwanted = two_predictions(spec)

    @torch.no_grad()
    def run():
        rule.forward(wanted, unwanted)

    return run


@operation("diffusers AdaptiveProjectedGuidance")
def projected(spec):
    from diffusers.guiders import AdaptiveProjectedGuidance
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

    rule = AdaptiveProjectedGuidance(
        guidance_scale=spec["scale"],
        adaptive_projected_guidance_momentum=spec["momentum"],
        adaptive_projected_guidance_rescale=spec["threshold"],
        eta=spec["eta"],
    )
    wanted, unwanted = two_predictions(spec)

    @torch.no_grad()
    def run():
        rule.momentum_buffer = MomentumBuffer(spec["momentum"])
        for _ in range(spec["steps"]):
            rule.forward(wanted, unwanted)

    return run


@operation("torch SGD with Nesterov momentum")
def optimize_noise(spec):
    generator = torch.Generator().manual_seed(0)
    noise, gain, target = (torch.randn(spec["shape"], generator=generator) for _ in range(3))
    axes = tuple(range(1, noise.dim()))
    d = noise[0].numel()

    def run():
        z = noise.clone().requires_grad_()
        optimizer = torch.optim.SGD([z], lr=5.0, momentum=0.9, nesterov=True)
        best, best_z = torch.full((len(noise),), float("inf")), noise.clone()
        for i in range(spec["iterations"]):
            optimizer.zero_grad()
            reward = (torch.tanh(z * gain) - target).square().mean(axes)
            norm = torch.linalg.vector_norm(z, dim=axes)
            loss = reward + 0.01 * (0.5 * norm**2 - (d - 1) * norm.log())
            with torch.no_grad():
                better = reward < best
                best = torch.where(better, reward, best)
                best_z[better] = z[better]
            if i + 1 < spec["iterations"]:
                loss.sum().backward()
                with torch.no_grad():
                    size = torch.linalg.vector_norm(z.grad, dim=axes, keepdim=True)
                    z.grad.mul_((0.1 / (size + 1e-6)).clamp(max=1.0))
                optimizer.step()

    return run


@operation("diffusers guided loop")
def guided_loop(spec):
    from diffusers.guiders import ClassifierFreeGuidance

    rule = ClassifierFreeGuidance(guidance_scale=spec["scale"])
    generator = torch.Generator().manual_seed(0)
    widths, rows = spec["widths"], spec["rows"]
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:])):
        layers += [torch.nn.Linear(a, b)] + ([torch.nn.SiLU()] if i + 2 < len(widths) else [])
    net = torch.nn.Sequential(*layers)
    noise = torch.randn(rows, widths[-1], generator=generator)
    classes = torch.zeros(2 * rows, widths[0] - widths[-1])
    classes[:rows, 3], classes[rows:, -1] = 1.0, 1.0

    @torch.no_grad()
    def run():
        x = noise
        for (alpha, sigma), (alpha_next, sigma_next) in zip(spec["levels"], spec["levels"][1:]):
            both = net(torch.cat([torch.cat([x, x]), classes], 1))
            eps = rule.forward(both[:rows], both[rows:]).pred
            x = alpha_next * (x - sigma * eps) / alpha + sigma_next * eps

    return run
