#!lua flags=allow-oom
-- Write a heartbeat and, for a model with a known shape, the shape of its images. Return false when the option XX is
-- given and the old heartbeat has expired. A plain SET fails when Redis is out of memory, and then no server would stay
-- alive to empty the queue.
-- KEYS: heartbeat, [shape]
-- ARGV: value and seconds to live of the shape, then value and options of SET for the heartbeat
local beat = redis.call('SET', KEYS[1], unpack(ARGV, 3))
if beat and KEYS[2] then redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2]) end
return beat
