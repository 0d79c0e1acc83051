"""Which method predicts best on natural images: 9,000 images of CIFAR-10, a small VAN, without augmentation.

Command    python -m training.study --config configs/study_cifar10.py --workdir checkpoints/study_cifar10 --resume \
           --data-dir DIR
Data       cifar10 and cifar100, prepared by TFDS in array_record format. CIFAR-10 may be whole, or a subset with 10,000
           training images and 2,000 test images: 9,000 train, 1,000 validate, 2,000 test; 5 shifts of 200 test images
           at 5 severities; inverted images, noise and CIFAR-100
Hardware   2 CPU cores, no GPU
Time       not measured as a whole; a training is sized for an hour
Expected   not yet measured
"""

from training.config import Config, Curvature, Data, Evaluation, Model, Optimizer, Prior
from training.study.config import Measures, Posterior, Regime, Study, Training

EVIDENCE = ("posthoc",)

study = Study(
    config=Config(
        data=Data(name="cifar10", train_examples=9_000, validation_examples=1_000),
        model=Model(variant="cifar"),
        optimizer=Optimizer(
            learning_rate=2e-3,
            batch_size=128,
            epochs=20,
            warmup_epochs=2,
            polish_epochs=10,
            polish_learning_rate=5e-4,
        ),
        prior=Prior(precision=1.0),
        curvature=Curvature(num_probes=16, max_vectors=64, microbatch=32),
        evaluation=Evaluation(grid_size=11, grid_low=1.0, grid_high=1e5),
    ),
    regimes=(Regime("clean"), Regime("wrong", {"data.wrong_labels": 0.2})),
    seeds=(0, 1, 2),
    trainings=(
        Training("adamw", weight_decay=0.05, ensemble=5, folds=1, held_out=0.1),
        Training("posthoc", folds=1, held_out=0.1),
        Training("joint", {"prior.update": "joint", "prior.burn_in": 2}, folds=1, held_out=0.1),
    ),
    posteriors=(
        Posterior("full", "laplace", weights="last_layer"),
        Posterior("full", "variational", weights="last_layer"),
        Posterior("kron", "laplace", weights="last_layer"),
        Posterior("diag", "laplace", trainings=EVIDENCE),
        Posterior("kron", "laplace", trainings=EVIDENCE),
        Posterior("lanczos", "laplace", trainings=EVIDENCE),
        Posterior("lanczos", "variational", trainings=EVIDENCE),
    ),
    measures=Measures(
        foreign=("inverted", "noise", "cifar100"), shift_examples=200, test_examples=2_000, max_iterations=8
    ),
)
