# Whole solves of convex problems.


def transport(name, solve):
    """A solve between two clouds of points that the request holds."""

    def prepare(spec):
        import numpy as np

        first = np.array(spec["from"]).reshape(-1, 2)
        second = np.array(spec["to"]).reshape(-1, 2) + 0.5
        cost = ((first[:, None] - second[None]) ** 2).sum(-1)
        cost /= cost.max()
        a = np.full(len(first), 1 / len(first))
        b = np.full(len(second), 1 / len(second))
        return lambda: solve(a, b, cost, spec)

    operation(name)(prepare)


def exact_transport(a, b, cost, spec):
    import ot

    ot.emd(a, b, cost, numItermax=10**7)


def sinkhorn(a, b, cost, spec):
    import ot

    ot.sinkhorn(a, b, cost, 0.05, stopThr=1e-9, numItermax=1000)


def smooth_transport(a, b, cost, spec):
    import contextlib
    import io

    import ot

    # The package prints a shape at every projection, which would end up among the answers.
    with contextlib.redirect_stdout(io.StringIO()):
        ot.smooth.smooth_ot_semi_dual(
            a,
            b,
            cost,
            reg=spec["gamma"],
            reg_type="sparsity_constrained",
            max_nz=spec["k"],
            method="L-BFGS-B",
            stopThr=1e-5 / len(a),
            numItermax=50,
        )


transport("ot.emd", exact_transport)
transport("ot.sinkhorn", sinkhorn)
transport("ot.smooth", smooth_transport)


@operation("ot.gromov")
def gromov(spec):
    import numpy as np
    import ot

    nodes = spec["nodes"]
    c1 = np.array(spec["c1"]).reshape(nodes, nodes)
    c2 = np.array(spec["c2"]).reshape(nodes, nodes)
    p = np.full(nodes, 1 / nodes)
    return lambda: ot.gromov.gromov_wasserstein2(c1, c2, p, p, "square_loss")


@operation("Lasso")
def lasso(spec):
    import numpy as np
    from sklearn.linear_model import Lasso

    generator = np.random.default_rng(0)
    n, p = spec["n"], spec["p"]
    x = np.asfortranarray(generator.standard_normal((n, p)))
    truth = np.zeros(p)
    truth[:: spec["every"]] = 1
    y = x @ truth + generator.standard_normal(n)
    model = Lasso(
        alpha=spec["alpha"], positive=True, fit_intercept=False, tol=1e-4, copy_X=False
    )
    return lambda: model.fit(x, y)


@operation("cvxpy network")
def convex_network(spec):
    import cvxpy as cp
    import numpy as np

    d = spec["d"]
    x = np.array(spec["x"]).reshape(-1, d)
    y = np.array(spec["y"])
    bits = np.array(spec["bits"]).reshape(len(y), -1)
    patterns = bits.shape[1]

    def run():
        v, w = cp.Variable((d, patterns)), cp.Variable((d, patterns))
        outputs = cp.sum(cp.multiply(bits, x @ (v - w)), axis=1)
        norms = cp.sum(cp.norm(v, 2, axis=0)) + cp.sum(cp.norm(w, 2, axis=0))
        signs = 2 * bits - 1
        cones = [cp.multiply(signs, x @ v) >= 0, cp.multiply(signs, x @ w) >= 0]
        objective = 0.5 * cp.sum_squares(outputs - y) + spec["beta"] * norms
        cp.Problem(cp.Minimize(objective), cones).solve(
            solver=cp.CLARABEL, tol_gap_rel=1e-3, tol_gap_abs=1e-3, tol_feas=1e-3
        )

    return run


@operation("cvxpy attention")
def attention(spec):
    import cvxpy as cp
    import numpy as np

    n, tokens, d = spec["n"], spec["T"], spec["d"]
    x = np.array(spec["x"]).reshape(n, tokens, d)
    z = np.array(spec["z"]).reshape(n, d)

    def run():
        w = cp.Variable((d, d))
        margins = [(x[i, :1] - x[i, 1:]) @ w @ z[i] >= 1 for i in range(n)]
        norm = cp.norm(w, "nuc") if spec["norm"] == "nuclear" else cp.sum_squares(w)
        cp.Problem(cp.Minimize(norm), margins).solve(solver=cp.CLARABEL)

    return run
