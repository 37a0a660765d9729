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


@operation("torch.func residual signs")
def residual_signs(spec):
    torch.manual_seed(0)
    params = []

    def conv(inputs, out, kernel, stride):
        std = (2 / (inputs * kernel * kernel)) ** 0.5
        params.append(torch.randn(out, inputs, kernel, kernel) * std)
        place = len(params) - 1
        convolve = torch.nn.functional.conv2d
        return lambda p, x: convolve(x, p[place], stride=stride, padding=kernel // 2)

    stem, blocks, inputs = conv(3, 16, 3, 1), [], 16
    for out, stride in spec["blocks"]:
        pair = conv(inputs, out, 3, stride), conv(out, out, 3, 1)
        blocks.append((*pair, conv(inputs, out, 1, stride) if stride > 1 else None))
        inputs = out
    params.append(torch.randn(10, inputs) * 0.1)

    def forward(p, x):
        h = stem(p, x).relu()
        for first, second, shortcut in blocks:
            inner = second(p, first(p, h).relu())
            h = (0.5 * inner + (shortcut(p, h) if shortcut else h)).relu()
        return h.mean((2, 3)) @ p[-1].T

    return sign_score(forward, tuple(params), torch.randn(spec["n"], 3, 32, 32), labels(spec["n"]))


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


@operation("jaxopt root_vjp")
def jaxopt_hyper_gradient(spec):
    import jax
    import jax.numpy as jnp
    from jaxopt.implicit_diff import root_vjp
    from jaxopt.linear_solve import solve_cg

    torch.manual_seed(0)
    n, d = spec["n"], spec["d"]
    array = lambda t: jnp.asarray(t.numpy())
    train = array(torch.randn(n, d)), array(labels(n))
    valid = array(torch.randn(1000, d)), array(labels(1000))

    def entropy(w, data):
        logs = jax.nn.log_softmax(data[0] @ w)
        return -jnp.take_along_axis(logs, data[1][:, None], 1).mean()

    def lower(w, decay, train):
        return entropy(w, train) + 0.5 * jnp.exp(decay) * jnp.square(w).sum()

    def solve(product, b):
        return solve_cg(product, b, maxiter=10, tol=0.0)

    @jax.jit
    def hyper(w, decay, train, valid):
        b = jax.grad(entropy)(w, valid)
        optimal = lambda w, decay: jax.grad(lower)(w, decay, train)
        return root_vjp(optimal, w, (decay,), b, solve=solve)[0]

    # XLA takes all cores, whatever the number of threads asked for.
    w, decay = jnp.zeros((d, 10)), jnp.float32(0.0)
    return lambda: hyper(w, decay, train, valid).block_until_ready() and None


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
