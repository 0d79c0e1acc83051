"""VAN on a subset of CIFAR-10 with 10,000 training images: natural colour images, 32 x 32 pixels, sized for a CPU.

Command    python -m training.fit_van --config configs/van_cifar10_subset.py
Data       a subset of CIFAR-10 with 10,000 training images (1,000 a class) and 2,000 test images, prepared as cifar10
           in the array_record format of TFDS: 9,000 images train, without augmentation, and 1,000 validate; the test
           images, and the same inverted. The numbers below are of this subset. With all of CIFAR-10 the same options
           choose other images
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
