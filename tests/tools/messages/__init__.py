"""Every message that a user can provoke: who provokes it, and what it then says.

``python tests/tools/messages`` writes snapshot.txt anew; read the difference before it is
committed. A message names the argument, what was got and what is wanted.
"""
