"""Registers the environment with Gymnasium.

The entry point is a string, so that registering imports neither torch nor stable-baselines3.
"""

from gymnasium.envs.registration import register, registry

ENV_ID = "DeepInsert/InsertLayer-v0"


def register_envs() -> None:
    """Register `DeepInsert/InsertLayer-v0`; a second call changes nothing.

    `import deepinsert` calls this. `gymnasium.register_envs(deepinsert)` shows readers and linters why the
    import is there.
    """
    if ENV_ID not in registry:
        # Gymnasium's passive checker and order enforcement stay on: an episode is one step, they cost little.
        register(id=ENV_ID, entry_point="deepinsert.envs.insert_layer_env:InsertLayerEnv")
