"""The method of Flax's MNIST example: arrays in memory, a new order for each epoch, a compiled step.

As in that example, an epoch leaves out the images that do not fill a batch (32 of 60,000). With --own it
trains the example's smaller network, with SGD.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import shared
from flax import nnx


class SameNet(nnx.Module):
    """The network that all peers train."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), padding="VALID", rngs=rngs)
        self.dropout1 = nnx.Dropout(0.25, rngs=rngs)
        self.dropout2 = nnx.Dropout(0.5, rngs=rngs)
        self.linear1 = nnx.Linear(9216, 128, rngs=rngs)
        self.linear2 = nnx.Linear(128, 10, rngs=rngs)
        assert sum(p.size for p in jax.tree.leaves(nnx.state(self, nnx.Param))) == shared.PARAMETERS

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        x = self.dropout1(nnx.max_pool(x, (2, 2), strides=(2, 2)))
        x = self.dropout2(nnx.relu(self.linear1(x.reshape(len(x), -1))))
        return self.linear2(x)


class OwnNet(nnx.Module):
    """The network of the example."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(7 * 7 * 64, 256, rngs=rngs)
        self.linear2 = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.conv1(x)), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        return self.linear2(nnx.relu(self.linear1(x.reshape(len(x), -1))))


def loss_of(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


@nnx.jit
def train_step(model, optimizer, images, labels):
    (loss, _), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model, images, labels)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def eval_step(model, images, labels):
    loss, logits = loss_of(model, images, labels)
    return loss, jnp.sum(logits.argmax(axis=1) == labels)


def train(model, optimizer, images, labels, batch, generator):
    model.train()
    order = generator.permutation(len(images))[: len(images) // batch * batch].reshape(-1, batch)
    losses = [train_step(model, optimizer, images[chosen], labels[chosen]) for chosen in order]
    return np.mean(jax.device_get(losses))


def evaluate(model, images, labels):
    model.eval()
    batches = [slice(start, start + shared.TEST_BATCH) for start in range(0, len(images), shared.TEST_BATCH)]
    results = [eval_step(model, images[batch], labels[batch]) for batch in batches]
    return sum(int(correct) for _, correct in jax.device_get(results)) / len(images)


def main():
    args = shared.parse_arguments(__doc__, "--own")
    training_set, test_set = shared.arrays(args.images, normalise=not args.own)
    if args.own:
        model, batch, method = OwnNet(nnx.Rngs(1)), 128, optax.sgd(0.1, momentum=0.9)
    else:
        model, batch = SameNet(nnx.Rngs(1)), shared.BATCH
        steps = len(training_set[0]) // batch
        rate = optax.exponential_decay(shared.RATE, steps, shared.GAMMA, staircase=True)
        method = optax.adadelta(rate, rho=shared.RHO, eps=shared.EPSILON)
    optimizer = nnx.Optimizer(model, method, wrt=nnx.Param)
    generator = np.random.default_rng(1)
    shared.begin()
    for _ in range(args.epochs):
        train(model, optimizer, *training_set, batch, generator)
        shared.report(evaluate(model, *test_set))


if __name__ == "__main__":
    main()
