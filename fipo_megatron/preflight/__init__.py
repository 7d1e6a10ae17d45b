"""Examines the nodes of a job in seconds, before anything expensive starts: ``fipo preflight CONFIG``.

Every node examines itself (:mod:`.examination`) and its neighbours (:mod:`.neighbours`). Node 0 gathers what they found
(:mod:`.gathering`); :mod:`.node_checks` and :mod:`.agreement_checks` turn it into one table (:mod:`.verdict_table`).
"""
