"""Rollouts in environments on the host, step by step.

`envs` puts the vector environments of PufferLib and gymnasium behind one interface, `HostEnv`;
`rollout` plays them. At each step a batch of agents, those that act at once, has

    obs           their observations, an array or a tree of them
    reward        for the previous action
    terminated    whether that action ended the episode
    truncated     whether the episode was cut off after it
    start         whether `obs` is the first of an episode
    mask          whether the agent plays: False where its action on `obs` is ignored
    final_obs     the last observation of the episode that just ended, where `obs` starts the next

and a whole batch of experience has the same as arrays (segments, time, ...): see `Experience`.
"""
