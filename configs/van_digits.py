"""VAN on 1,797 real handwritten digits, 8 x 8 pixels: the default experiment.

Command    python -m training.fit_van
Data       digits (embedded): 1,257 training, 180 validation and 360 test images, 10 classes
Hardware   2 CPU cores, no GPU, 2.2 GB of memory
Time       two and a half minutes with cold compile caches, two with warm ones
Expected   The MAP network has a test accuracy of at least 97 %. The log evidence is near -575 nats with Lanczos
           and near -1,320 with the diagonal. At the precision of the evidence both predictives of Laplace are
           underconfident (NLL near .65). The variational ones are not (NLL near .07 where MAP has .06), and that of
           Lanczos is a better detector of foreign images than MAP.
"""

from training.config import Config, Curvature, Data, Model, Optimizer, Prior

config = Config(
    data=Data(name="digits"),
    model=Model(variant="digits"),
    optimizer=Optimizer(learning_rate=1e-2, batch_size=32, epochs=40, polish_epochs=45, polish_learning_rate=1e-2),
    prior=Prior(update="online"),
    curvature=Curvature(variational_iterations=6),
)
