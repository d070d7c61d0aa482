#!lua flags=no-writes
-- Return the seconds until each accepted marker expires; -2 for one that does not exist. Not milliseconds: Redis users
-- set up by docs/operations.md have no permission for PTTL.
-- KEYS: accepted markers
local ttls = {}
for i, marker in ipairs(KEYS) do ttls[i] = redis.call('TTL', marker) end
return ttls
