"""Makes the environment known to Gymnasium.

The entry point is a string, so that registering imports neither torch nor stable-baselines3.
"""

from gymnasium.envs.registration import register, registry

ENV_ID = "DeepInsert/InsertLayer-v0"


def register_envs() -> None:
    """Register `DeepInsert/InsertLayer-v0`; doing so again changes nothing.

    `import deepinsert` calls this; `gymnasium.register_envs(deepinsert)` tells readers and linters why.
    """
    if ENV_ID not in registry:
        # Passive checking and order enforcement stay on: an episode is one step, they cost little.
        register(id=ENV_ID, entry_point="deepinsert.envs.insert_layer_env:InsertLayerEnv")
