#!lua flags=allow-oom
-- Write a heartbeat, and announce the model. With the option XX, return false if the old heartbeat has expired. A script,
-- because a plain SET fails when Redis is out of memory: every heartbeat would expire, and nobody would empty the queue.
-- KEYS: heartbeat, list of models, marker of this model, shape (optional)
-- ARGV: prefix of the markers, name of the model, its entry in the list, value of the shape, seconds for which a model is
--       known, value of the heartbeat, options of its SET
local beat = redis.call('SET', KEYS[1], unpack(ARGV, 6))
if not beat then return beat end
redis.call('SET', KEYS[3], '', 'EX', ARGV[5])
if KEYS[4] then redis.call('SET', KEYS[4], ARGV[4], 'EX', ARGV[5]) end
local valid, models = pcall(cjson.decode, redis.call('GET', KEYS[2]) or '{}')
if not valid or type(models) ~= 'table' then models = {} end
local own = cjson.decode(ARGV[3])
for name, model in pairs(models) do
    -- A model on the same queue without a live server has been replaced by this one.
    local queue, server = type(model) == 'table' and model.queue, type(model) == 'table' and model.server
    local replaced = queue == own.queue and redis.call('EXISTS', queue .. ':server:' .. tostring(server)) == 0
    if not queue or replaced or redis.call('EXISTS', ARGV[1] .. name) == 0 then models[name] = nil end
end
models[ARGV[2]] = own
redis.call('SET', KEYS[2], cjson.encode(models), 'EX', ARGV[5])
return beat
