# Guidance: combinations of two predictions, noise that is optimized for a reward, operators, experts.


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
    net = perceptron(widths)
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


def operator(name, make):
    """An operator and its transpose."""

    def prepare(spec):
        physics, x = make(spec), torch.randn(spec["shape"])

        @torch.no_grad()
        def run():
            physics.A_adjoint(physics.A(x))

        return run

    operation(name)(prepare)


def inpainting(spec):
    from deepinv.physics import Inpainting

    image, size = spec["shape"][1:], spec["size"]
    mask = torch.ones(image)
    low = [n // 2 - size // 2 for n in image[1:]]
    mask[:, low[0] : low[0] + size, low[1] : low[1] + size] = 0.0
    return Inpainting(img_size=tuple(image), mask=mask)


def downsampling(spec):
    from deepinv.physics import Downsampling

    f = spec["factor"]
    box = torch.full((1, 1, f, f), 1.0 / f**2)
    return Downsampling(img_size=tuple(spec["shape"][1:]), filter=box, factor=f)


operator("deepinv Inpainting", inpainting)
operator("deepinv Downsampling", downsampling)


def expert(name, merged):
    """Guided steps by a network with adapters."""

    def prepare(spec):
        from peft import LoraConfig, get_peft_model

        rank, alpha = spec["adapter"]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=r".*conv")
        net = get_peft_model(ResNet(spec), config).eval().requires_grad_(False)
        if merged:
            net.merge_adapter()
        noise = torch.randn(spec["shape"])

        def run():
            x = noise
            for (alpha, sigma), (alpha_next, sigma_next) in zip(spec["levels"], spec["levels"][1:]):
                at = x.detach().requires_grad_()
                log_p = net(at).log_softmax(1)[:, 3].sum()
                (gradient,) = torch.autograd.grad(log_p, at)
                with torch.no_grad():
                    eps = 0.1 * x - spec["scale"] * sigma * gradient
                    x = alpha_next * (x - sigma * eps) / alpha + sigma_next * eps

        return run

    operation(name)(prepare)


expert("peft LoRA", False)
expert("peft LoRA, merged", True)
