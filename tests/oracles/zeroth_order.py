"""Zeroth-order optimizers in NumPy, float64, on one weight matrix, given every random number."""

import numpy as np


def tezo_direction(left, right, tau):
    """Z = sum over s of tau_s u_s v_s^T, written as the sum (TeZO, section 3)."""
    z = np.zeros((left.shape[0], right.shape[0]))
    for s in range(len(tau)):
        z += tau[s] * np.outer(left[:, s], right[:, s])
    return z


def coefficient(loss, weight, direction, rho):
    return (loss(weight + rho * direction) - loss(weight - rho * direction)) / (2 * rho)


def scale_factors(mode, energy):
    return {"none": (1.0, 1.0), "unbiased": (1.0, 1 / energy), "unit": (energy**-0.5, energy**-0.5)}[mode]


def tezo(loss, weight, left, right, taus, *, lr, rho, variant, scale="unit", betas=(0.9, 0.99), eps=1e-8, correct=True):
    """All variants of TeZO; returns the weights after each step and the coefficients."""
    weight = weight.astype(np.float64).copy()
    rank = left.shape[1]
    probe, update = scale_factors(scale, rank)
    mean, square = np.zeros(rank), np.zeros(rank)
    b1, b2 = betas
    weights, kappas = [], []
    for t, tau in enumerate(taus, start=1):
        kappa = coefficient(loss, weight, probe * tezo_direction(left, right, tau), rho)
        g = kappa * update * tau
        c1, c2 = (1 - b1**t, 1 - b2**t) if correct else (1.0, 1.0)
        if variant == "sgd":
            weight -= lr * tezo_direction(left, right, g)
        elif variant == "momentum":
            mean = b1 * mean + (1 - b1) * g
            weight -= lr * tezo_direction(left, right, mean)
        elif variant == "adam":
            mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
            variance = sum(square[s] / c2 * np.outer(left[:, s] ** 2, right[:, s] ** 2) for s in range(rank))
            weight -= lr * tezo_direction(left, right, mean / c1) / np.sqrt(variance + eps)
        elif variant == "factor_adam":
            mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
            weight -= lr * tezo_direction(left, right, (mean / c1) / (np.sqrt(square / c2) + eps))
        elif variant == "lion":
            mixed, mean = b1 * mean + (1 - b1) * g, b2 * mean + (1 - b2) * g
            weight -= lr * np.sign(tezo_direction(left, right, mixed))
        weights.append(weight.copy())
        kappas.append(kappa)
    return weights, kappas


def dense(loss, weight, directions, *, lr, rho, variant, betas=(0.9, 0.999), eps=1e-8):
    """MeZO and its variants, given the directions."""
    weight = weight.astype(np.float64).copy()
    mean, square, energy = np.zeros_like(weight), np.zeros_like(weight), 0.0
    b1, b2 = betas
    weights = []
    for t, z in enumerate(directions, start=1):
        kappa = coefficient(loss, weight, z, rho)
        g = kappa * z
        if variant == "sgd":
            weight -= lr * g
        elif variant == "momentum":
            mean = b1 * mean + (1 - b1) * g
            weight -= lr * mean
        elif variant == "adam":
            mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
            weight -= lr * (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + eps)
        elif variant == "lion":
            weight -= lr * np.sign(b1 * mean + (1 - b1) * g)
            mean = b2 * mean + (1 - b2) * g
        elif variant == "scalar":
            energy = b2 * energy + (1 - b2) * kappa**2
            weight -= lr * g / (np.sqrt(energy / (1 - b2**t)) + eps)
        weights.append(weight.copy())
    return weights


def lozo_momentum(loss, weight, lefts, rights, *, lr, rho, every, beta, factor):
    """LOZO-M: N is kept in the left factor's coordinates and carried over at a refresh."""
    weight = weight.astype(np.float64).copy()
    n = weight.shape[1]
    kept = np.zeros_like(lefts[0])
    for t, left in enumerate(lefts):
        right = rights[t // every]
        if t and t % every == 0:
            kept = kept @ rights[t // every - 1].T @ right / n
        kappa = coefficient(loss, weight, factor * left @ right.T, rho)
        kept = beta * kept + (1 - beta) * kappa * factor * left
        weight -= lr * kept @ right.T
    return weight


def hizoo(loss, weight, draws, *, lr, rho, smooth):
    """HiZOO with its three forward passes (Algorithm 1)."""
    weight, hessian = weight.astype(np.float64).copy(), np.ones_like(weight)
    for z in draws:
        direction = z / np.sqrt(hessian)
        plus, minus, middle = loss(weight + rho * direction), loss(weight - rho * direction), loss(weight)
        kappa = (plus - minus) / (2 * rho)
        hessian = (1 - smooth) * hessian + smooth * abs(plus + minus - 2 * middle) / (2 * rho**2) * hessian * z**2
        weight -= lr * kappa * z / np.sqrt(hessian)
    return weight


def fzoo(loss, weight, batches, *, lr, rho):
    """FZOO: one-sided probes along signs, normalized by their losses' standard deviation."""
    weight = weight.astype(np.float64).copy()
    for signs in batches:
        middle = loss(weight)
        losses = np.array([loss(weight + rho * u) for u in signs])
        spread = losses.std(ddof=1)
        weight = weight - lr / (len(signs) * spread) * sum((losses - middle)[:, None, None] * np.array(signs))
    return weight


def conmezo(loss, weight, draws, *, lr, rho, angle, beta):
    """ConMeZO with an unnormalized Gaussian part."""
    weight, mean = weight.astype(np.float64).copy(), np.zeros_like(weight)
    for z in draws:
        length = np.linalg.norm(mean)
        if length > 0:
            z = np.cos(angle) * np.sqrt(weight.size) * mean / length + np.sin(angle) * z
        kappa = coefficient(loss, weight, z, rho)
        mean = beta * mean + (1 - beta) * kappa * z
        weight -= lr * kappa * z
    return weight
