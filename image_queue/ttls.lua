#!lua flags=no-writes
-- Return the seconds until each accepted marker expires; -2 for one that does not exist. TTL rather than PTTL: the Redis
-- user of docs/operations.md has no permission for PTTL.
-- KEYS: accepted markers
local ttls = {}
for i, marker in ipairs(KEYS) do ttls[i] = redis.call('TTL', marker) end
return ttls
