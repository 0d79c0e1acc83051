"""VAN on CIFAR-10: 50,000 natural colour images, 32 x 32 pixels.

Command    python -m training.fit_van --config configs/van_cifar10.py
Data       cifar10, prepared by TFDS in array_record format: 45,000 training, 5,000 validation (held out from the
           training images) and 10,000 test images, 10 classes
Hardware   one GPU
Time       not yet measured on a GPU; far too slow for a CPU
Expected   not yet measured
"""

from training.config import Config, Data, Model, Optimizer

config = Config(
    data=Data(
        name="cifar10",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augment=True,
    ),
    model=Model(variant="cifar", drop_path=0.1),
    optimizer=Optimizer(
        learning_rate=2e-3,
        batch_size=128,
        epochs=100,
        warmup_epochs=5,
        polish_epochs=10,
        polish_learning_rate=3e-4,
    ),
)
