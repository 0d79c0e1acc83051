"""VAN on a fifth of CIFAR-10: natural colour images, 32 x 32 pixels, sized for a CPU.

Command    python -m training.fit_van --config configs/van_cifar10_subset.py
Data       cifar10, prepared by TFDS in array_record format: 9,000 training images without augmentation, 1,000
           validation and 2,000 test images, 10 classes; 2,000 of the test images, inverted
Hardware   2 CPU cores, no GPU, under 4 GB of memory
Time       31 minutes on one core: 24 to train, 2 for the posteriors, and 5 to evaluate
Expected   Test accuracy .64 and NLL 1.06, with a temperature .99. By the evidence the posteriors of Laplace are
           underconfident: 1.19 with the diagonal, 1.31 with Lanczos, whose 96 vectors do not suffice at that precision
Methods    MAP, MAP with a temperature, and the diagonal and the Lanczos posterior, whose curvature is that of 512
           training images, times 9,000 / 512.
"""

from training.config import Config, Curvature, Data, Evaluation, Model, Optimizer, Prior

config = Config(
    data=Data(name="cifar10", train_examples=9_000, validation_examples=1_000),
    model=Model(variant="cifar"),
    optimizer=Optimizer(
        learning_rate=2e-3,
        batch_size=64,
        epochs=15,
        warmup_epochs=2,
        polish_epochs=4,
        polish_learning_rate=5e-4,
    ),
    prior=Prior(precision=1.0),
    curvature=Curvature(num_probes=32, max_vectors=96, microbatch=64, examples=512),
    evaluation=Evaluation(examples=2_000),
)
