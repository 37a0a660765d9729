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


# Consensus-based optimization.


@operation("cbx CBO")
def cbx_step(spec):
    import numpy
    from cbx.dynamics import CBO
    from cbx.objectives import Rastrigin

    n, d = spec["n"], spec["d"]
    x = numpy.random.default_rng(0).normal(1.0, 1.0, (1, n, d))
    dynamics = CBO(
        Rastrigin(), x=x, noise="isotropic", alpha=1.0, sigma=0.1, lamda=1.0, dt=0.01, verbosity=0
    )
    return dynamics.step


# Signs of the gradients of every example.


def labels(n):
    return torch.arange(n) % 10


def sign_score(forward, params, x, y):
    def loss(params, x, y):
        return torch.nn.functional.cross_entropy(forward(params, x[None]), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run():
        signs = gradients(params, x, y)
        return sum(g.sign().sum(0).abs().sum().item() for g in signs)

    return run


@operation("torch.func perceptron signs")
def perceptron_signs(spec):
    torch.manual_seed(0)
    pairs = list(zip(spec["widths"], spec["widths"][1:]))
    params = tuple(torch.randn(b, a) * 0.05 for a, b in pairs)

    def forward(params, x):
        for i, w in enumerate(params):
            x = x @ w.T
            if i + 1 < len(params):
                x = x.relu()
        return x

    return sign_score(forward, params, torch.randn(spec["n"], spec["widths"][0]), labels(spec["n"]))


@operation("torch.func convolution signs")
def convolution_signs(spec):
    torch.manual_seed(0)
    pairs = list(zip(spec["channels"], spec["channels"][1:]))
    params = tuple(torch.randn(b, a, 3, 3) * 0.1 for a, b in pairs) + (torch.randn(10, 16) * 0.1,)

    def forward(params, x):
        for w in params[:-1]:
            x = torch.nn.functional.conv2d(x, w, padding=1).relu()
        return x.mean((2, 3)) @ params[-1].T

    x = torch.randn(spec["n"], spec["channels"][0], 16, 16)
    return sign_score(forward, params, x, labels(spec["n"]))


# Second order.


@operation("torch.autograd hyper-gradient")
def hyper_gradient(spec):
    torch.manual_seed(0)
    n, d = spec["n"], spec["d"]
    x, y = torch.randn(n, d), labels(n)
    valid = torch.randn(1000, d), labels(1000)
    w = torch.zeros(d, 10, requires_grad=True)
    decay = torch.zeros(1, requires_grad=True)
    entropy = torch.nn.functional.cross_entropy

    def run():
        (b,) = torch.autograd.grad(entropy(valid[0] @ w, valid[1]), w)
        lower = entropy(x @ w, y) + 0.5 * decay.exp() * w.square().sum()
        (g,) = torch.autograd.grad(lower.sum(), w, create_graph=True)

        def product(v):
            return torch.autograd.grad(g, w, v, retain_graph=True)[0]

        z, r = torch.zeros_like(b), b.clone()
        p, rr = r.clone(), r.square().sum()
        for _ in range(10):
            hp = product(p)
            a = rr / (p * hp).sum()
            z, r = z + a * p, r - a * hp
            after = r.square().sum()
            p, rr = r + after / rr * p, after
        return -torch.autograd.grad(g, decay, z)[0]

    return run


@operation("torch power iteration on Hessian products")
def power_iteration(spec):
    torch.manual_seed(0)
    pairs = list(zip(spec["widths"], spec["widths"][1:]))
    params = [(torch.randn(a, b) * 0.05).requires_grad_() for a, b in pairs]
    x, y = torch.randn(spec["n"], spec["widths"][0]), labels(spec["n"])

    def run():
        h = (x @ params[0]).tanh() @ params[1]
        loss = torch.nn.functional.cross_entropy(h.tanh() @ params[2], y)
        g = torch.autograd.grad(loss, params, create_graph=True)
        v = [torch.randn_like(p) for p in params]
        for _ in range(spec["products"]):
            norm = sum(p.square().sum() for p in v).sqrt()
            v = torch.autograd.grad(g, params, [p / norm for p in v], retain_graph=True)
        return norm

    return run
