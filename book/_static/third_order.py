"""The order of DPM-Solver++ (3M), with its second difference as
released and doubled. Needs numpy alone.

Data: +1 or -1 with equal probability. In variance-exploding form,
x = data + sigma * noise, the posterior mean is tanh(x / sigma^2), and
with lam = -log(sigma) the flow is dx/dlam = mean(x, lam) - x.

The stochastic update is run on normal data of variance 1/4. There the
mean is linear in x, so a run is a sum of responses, one to the start
and one to the noise of each step, and the variance of its result is
the sum of their squares.
"""
import numpy as np

FIRST, LAST = -4.0, 1.5  # lam
SPREAD = 0.25  # variance of the normal data


def mean(x, lam):
    return np.tanh(x * np.exp(2 * lam))


def multistep(x, n, factor):
    "The update in the notation of the released code, even steps."
    lams = np.linspace(FIRST, LAST, n + 1)
    past = []
    for lam, then in zip(lams, lams[1:]):
        past = [(lam, mean(x, lam)), *past][:3]
        h, m0 = then - lam, past[0][1]
        phi_1 = np.expm1(-h)
        new = np.exp(-h) * x - phi_1 * m0
        if len(past) == 2:
            r0 = (lam - past[1][0]) / h
            new = new - 0.5 * phi_1 * (m0 - past[1][1]) / r0
        if len(past) == 3:
            r0 = (lam - past[1][0]) / h
            r1 = (past[1][0] - past[2][0]) / h
            d0 = (m0 - past[1][1]) / r0
            d1 = (past[1][1] - past[2][1]) / r1
            D1 = d0 + r0 / (r0 + r1) * (d0 - d1)
            D2 = factor * (d0 - d1) / (r0 + r1)
            phi_2 = phi_1 / h + 1.0
            phi_3 = phi_2 / h - 0.5
            new = new + phi_2 * D1 - phi_3 * D2
        x = new
    return x


def stochastic(n, factor, half):
    "Standard deviation that n steps of sde-dpmsolver++ arrive at."
    lams, past = np.linspace(FIRST, LAST, n + 1), []
    x = np.zeros(n + 1)  # a response each; the first to the start
    x[0] = np.sqrt(SPREAD + np.exp(-2 * FIRST))
    for i, (lam, then) in enumerate(zip(lams, lams[1:]), start=1):
        past = [SPREAD / (SPREAD + np.exp(-2 * lam)) * x, *past][:3]
        two_h, m0 = 2 * (then - lam), past[0]
        new = 1 - np.exp(-two_h)
        x = np.exp(-two_h) * x + new * m0
        if len(past) == 2:
            x = x + 0.5 * new * (m0 - past[1])
        if len(past) == 3:
            d0, d1 = m0 - past[1], past[1] - past[2]  # equal steps
            D1, D2 = d0 + (d0 - d1) / 2, factor * (d0 - d1) / 2
            x = x + (1 - new / two_h) * D1
            x = x + ((new - two_h) / two_h**2 + half) * D2
        x[i] += np.exp(-then) * np.sqrt(new)
    return np.sqrt((x**2).sum())


def exact(x, n=20000):
    """Runge-Kutta of fourth order with many steps."""
    h = (LAST - FIRST) / n
    for lam in FIRST + h * np.arange(n):
        f = lambda y, u: mean(y, u) - y
        a = f(x, lam)
        b = f(x + h / 2 * a, lam + h / 2)
        c = f(x + h / 2 * b, lam + h / 2)
        x = x + h / 6 * (a + 2 * b + 2 * c + f(x + h * c, lam + h))
    return x


def told(name, errors):
    orders = [np.log2(a / b) for a, b in zip(errors, errors[1:])]
    said = " ".join(f"{e:.1e}" for e in errors)
    print(f"{name:21} errors {said}   orders",
          " ".join(f"{p:.2f}" for p in orders))


if __name__ == "__main__":
    start = np.exp(-FIRST) * np.linspace(-2, 2, 41)
    end, steps = exact(start), (40, 80, 160, 320)
    for factor, name in ((1, "as released"), (2, "D2 doubled")):
        found = [multistep(start, n, factor) for n in steps]
        told(name, [np.abs(x - end).mean() for x in found])
    true = np.sqrt(SPREAD + np.exp(-2 * LAST))
    for factor, half, name in (
        (1, -0.5, "sde as released"),
        (1, 0.5, "sde + 0.5"),
        (2, 0.5, "sde + 0.5, D2 doubled"),
        (2, -0.5, "sde D2 doubled alone"),
    ):
        many = [4 * n for n in steps]
        found = [stochastic(n, factor, half) for n in many]
        told(name, [abs(x - true) for x in found])
