# Optimizer steps over parameters whose gradients are there already.

# The parameters of the last request: several operations in a row work on the same ones.
DRAWN = {}


def parameters(spec):
    key = json.dumps(spec["shapes"])
    if key not in DRAWN:
        DRAWN.clear()
        generator = torch.Generator().manual_seed(0)
        params = []
        for shape in spec["shapes"]:
            p = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
            p.grad = torch.randn(shape, generator=generator) * 0.001
            params.append(p)
        DRAWN[key] = params
    return DRAWN[key]


def optimizer(name, make):
    operation(name)(lambda spec: make(parameters(spec)).step)


def lion(params):
    from lion_pytorch import Lion

    return Lion(params, lr=1e-4, weight_decay=0.0)


def spam(params):
    from pytorch_optimizer import SPAM

    return SPAM(params, lr=1e-3, density=1.0)


def ortho_grad(params):
    from pytorch_optimizer import OrthoGrad

    return OrthoGrad(torch.optim.AdamW(params, fused=True))


optimizer("AdamW fused", lambda p: torch.optim.AdamW(p, fused=True))
optimizer("AdamW foreach", lambda p: torch.optim.AdamW(p, foreach=True))
optimizer("SGD fused", lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True))
optimizer("SGD foreach", lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True))
optimizer("lion-pytorch", lion)
optimizer("pytorch-optimizer SPAM", spam)
optimizer("pytorch-optimizer OrthoGrad over AdamW fused", ortho_grad)
