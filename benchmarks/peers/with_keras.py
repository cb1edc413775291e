"""The method of Keras' "Simple MNIST convnet": arrays in memory, compile, fit.

Keras runs on JAX here, or on PyTorch with KERAS_BACKEND=torch. With --own it trains the example's smaller
network, with Adam.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import shared
from keras import callbacks, layers


def network(own):
    """Return the network of the example, or the one that all peers train."""
    one, two = (layers.Conv2D(channels, 3, activation="relu") for channels in (32, 64))
    if own:
        body = [one, layers.MaxPooling2D(2), two, layers.MaxPooling2D(2), layers.Flatten()]
    else:
        body = [one, two, layers.MaxPooling2D(2), layers.Dropout(0.25), layers.Flatten()]
        body.append(layers.Dense(128, activation="relu"))
    head = [layers.Dropout(0.5), layers.Dense(10, activation="softmax")]
    model = keras.Sequential([keras.Input((28, 28, 1)), *body, *head])
    assert own or model.count_params() == shared.PARAMETERS
    return model


def main():
    args = shared.parse_arguments(__doc__, "--own")
    keras.utils.set_random_seed(1)
    training_set, test_set = (
        (images, keras.utils.to_categorical(labels, 10))
        for images, labels in shared.arrays(args.images, normalise=not args.own)
    )
    if args.own:
        batch, optimizer, schedule = 128, "adam", []
    else:
        batch = shared.BATCH
        optimizer = keras.optimizers.Adadelta(shared.RATE, rho=shared.RHO, epsilon=shared.EPSILON)
        schedule = [callbacks.LearningRateScheduler(lambda epoch: shared.RATE * shared.GAMMA**epoch)]
    model = network(args.own)
    model.compile(loss="categorical_crossentropy", optimizer=optimizer, metrics=["accuracy"])

    def evaluate(epoch, logs):
        result = model.evaluate(*test_set, batch_size=shared.TEST_BATCH, verbose=0, return_dict=True)
        shared.report(result["accuracy"])

    reports = callbacks.LambdaCallback(on_train_begin=lambda logs: shared.begin(), on_epoch_end=evaluate)
    model.fit(*training_set, batch_size=batch, epochs=args.epochs, verbose=0, callbacks=[*schedule, reports])


if __name__ == "__main__":
    main()
