"""The method of Keras' "Simple MNIST convnet": arrays in memory, compile, fit.

Keras runs on JAX here; KERAS_BACKEND=torch chooses another. With --own it has the example's smaller
network, and Adam.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import shared
from keras import layers


def same_net():
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Dropout(0.25),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )
    assert model.count_params() == shared.PARAMETERS
    return model


def own_net():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )


class Reporter(keras.callbacks.Callback):
    """Evaluates after each epoch, in batches of its own size, and reports."""

    def __init__(self, reports, images, labels):
        super().__init__()
        self.reports, self.images, self.labels = reports, images, labels

    def on_train_begin(self, logs=None):
        self.reports.ready()

    def on_epoch_end(self, epoch, logs=None):
        result = self.model.evaluate(
            self.images, self.labels, batch_size=shared.TEST_BATCH, verbose=0, return_dict=True
        )
        self.reports.finished_epoch(result["accuracy"])


def main():
    args = shared.parse_arguments(__doc__, own=True)
    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(args.threads)
    keras.utils.set_random_seed(1)
    (images, labels), (test_images, test_labels) = (
        ((images[..., None] / 255).astype("float32"), keras.utils.to_categorical(labels, 10))
        for images, labels in shared.arrays(args.images)
    )
    if args.own:
        model, optimizer, batch, callbacks = own_net(), "adam", 128, []
    else:
        images, test_images = (images - shared.MEAN) / shared.STD, (test_images - shared.MEAN) / shared.STD
        model, batch = same_net(), shared.BATCH
        optimizer = keras.optimizers.Adadelta(
            learning_rate=shared.RATE, rho=shared.RHO, epsilon=shared.EPSILON
        )
        callbacks = [keras.callbacks.LearningRateScheduler(lambda epoch: shared.RATE * shared.GAMMA**epoch)]
    model.compile(loss="categorical_crossentropy", optimizer=optimizer, metrics=["accuracy"])
    callbacks.append(Reporter(shared.Reports(), test_images, test_labels))
    model.fit(images, labels, batch_size=batch, epochs=args.epochs, verbose=0, callbacks=callbacks)


if __name__ == "__main__":
    main()
