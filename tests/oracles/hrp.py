"""Slow float64 transcriptions of adapter starts, in NumPy. The equations are those of the methods' docstrings."""

import numpy as np


def hrp(A, B, rank, init_factor="A", length=3**-0.5):
    """Decompose the dense product and give its leading vectors to one factor (or share them out)."""
    U, S, Vh = np.linalg.svd(np.asarray(B, np.float64) @ np.asarray(A, np.float64), full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    if init_factor == "A":
        return length * Vh, np.zeros_like(U)
    if init_factor == "B":
        return np.zeros_like(Vh), length * U
    return np.diag(np.sqrt(S)) @ Vh, U @ np.diag(np.sqrt(S))


def pissa(W, rank, scaling):
    U, S, Vh = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
    root = np.diag(np.sqrt(S[:rank] / scaling))
    return root @ Vh[:rank], U[:, :rank] @ root


def milora(W, rank, scaling):
    U, S, Vh = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
    root = np.diag(np.sqrt(S[-rank:] / scaling))
    return root @ Vh[-rank:], U[:, -rank:] @ root


def lora_one(G, rank, gamma):
    U, S, Vh = np.linalg.svd(-np.asarray(G, np.float64), full_matrices=False)
    root = np.diag(np.sqrt(S[:rank] / S[0] / gamma))
    return root @ Vh[:rank], U[:, :rank] @ root


def lora_ga(G, rank, convention, gamma=16.0):
    U, S, Vh = np.linalg.svd(np.asarray(G, np.float64), full_matrices=False)
    factor = G.shape[0] ** 0.25 / gamma**0.5
    if convention == "authors":
        return factor * Vh[:rank], factor * U[:, rank : 2 * rank]
    return Vh[:rank], factor * U[:, rank : 2 * rank] @ np.diag(S[rank : 2 * rank])


def corda(W, C, rank, scaling, damping=0.01):
    C = np.asarray(C, np.float64)
    C = C + damping * np.mean(np.diag(C)) * np.eye(len(C))
    U, S, Vh = np.linalg.svd(np.asarray(W, np.float64) @ C, full_matrices=False)
    root = np.diag(np.sqrt(S[:rank] / scaling))
    return root @ Vh[:rank] @ np.linalg.inv(C), U[:, :rank] @ root


def olora(W, rank):
    Q, R = np.linalg.qr(np.asarray(W, np.float64))
    return R[:rank], Q[:, :rank]


def mica(W, rank):
    U = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)[0]
    return np.zeros((rank, W.shape[1])), U[:, -rank:]


def lora_xs(W, rank):
    U, S, Vh = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


def lora_sb(G, rank):
    U, _, Vh = np.linalg.svd(-np.asarray(G, np.float64), full_matrices=False)
    return Vh[:rank], U[:, :rank]


def eva(C, out, rank):
    """The eigenvectors of the inputs' second moment, largest eigenvalue first."""
    values, vectors = np.linalg.eigh(np.asarray(C, np.float64))
    return vectors[:, np.argsort(-values)[:rank]].T, np.zeros((out, rank))


def default(uniform, out):
    """From numbers in [0, 1): Kaiming's bound with a = sqrt(5), which PEFT takes."""
    bound = np.sqrt(6 / ((1 + 5) * uniform.shape[1]))
    return bound * (2 * uniform - 1), np.zeros((out, len(uniform)))


def gaussian(normal, out):
    return normal / len(normal), np.zeros((out, len(normal)))


def orthogonal(square, right, left):
    """Gram-Schmidt on the columns, with the signs of a Householder QR; alternate rows go to the two factors."""
    Q = np.zeros_like(square)
    for j in range(len(square)):
        v = square[:, j] - Q[:, :j] @ (Q[:, :j].T @ square[:, j])
        Q[:, j] = v / np.linalg.norm(v)
    Q = Q * np.sign(np.sum(Q * np.linalg.qr(square)[0], 0))
    A = sum(np.outer(Q[2 * i], right[:, i]) for i in range(right.shape[1])) / 10
    B = sum(np.outer(left[:, i], Q[2 * i + 1]) for i in range(left.shape[1])) / 10
    return A, B


def etf(start, out, rounds):
    """Columns of equal length, then the nearest frame with orthonormal rows, in turn."""
    frame = start
    for _ in range(rounds):
        U, _, Vh = np.linalg.svd(frame / np.linalg.norm(frame, axis=0), full_matrices=False)
        frame = U @ Vh
    return frame / np.sqrt(3), np.zeros((out, len(start)))


def captured(M, A):
    """Share of a matrix' energy in the row space of A."""
    projector = np.linalg.pinv(A) @ A
    return np.linalg.norm(M @ projector) ** 2 / np.linalg.norm(M) ** 2
