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


def captured(M, A):
    """Share of a matrix' energy in the row space of A."""
    projector = np.linalg.pinv(A) @ A
    return np.linalg.norm(M @ projector) ** 2 / np.linalg.norm(M) ** 2
