-- Claims: an image handed to a worker under a lease, and how it ends.

local function forget(member, worker)
  local job, position = split(member)
  redis.call('HDEL', key_of(job) .. ':progress', position)
  redis.call('DEL', 'lf:claim:' .. member)
  redis.call('ZREM', 'lf:leases', member)
  redis.call('SREM', 'lf:worker:' .. worker .. ':claims', member)
  redis.call('HDEL', 'lf:worker:' .. worker .. ':alone', member)
end

local function holds(member, token)
  return redis.call('HGET', 'lf:claim:' .. member, 'token') == token
end

-- A token never comes again, even if the server forgot a second: time goes on.
local function new_token()
  return (redis.call('HGET', 'lf:epoch', 'number') or '0') .. '-' .. redis.call('INCR', 'lf:fence') .. '-' .. now()
end

-- {job, position, token, queue, doubtful}: doubtful means that somebody may have published it before
local function grant(job, position, worker, queue, lease, doubtful)
  local member, token = job .. '/' .. position, new_token()
  local f = get(job, 'owner', 'cost', 'epoch', 'started', 'max_runtime')
  local cost = number(f[2])
  redis.call('HSET', 'lf:claim:' .. member, 'token', token, 'worker', worker, 'queue', queue)
  redis.call('ZADD', 'lf:leases', now() + lease, member)
  redis.call('SADD', 'lf:worker:' .. worker .. ':claims', member)
  waits(job, -1)
  owner_has(f[1], 'running', 1)
  count(job, 'running', 1)
  count(job, 'starts', 1)
  mark(job, position, 'r')
  local lane = lane_of(queue)
  local floor = number(redis.call('ZSCORE', 'lf:vt:' .. lane, f[1]))
  redis.call('SET', 'lf:floor:' .. lane, math.max(floor, number(redis.call('GET', 'lf:floor:' .. lane))))
  redis.call('SET', 'lf:served:' .. queue, now())
  charge(f[1], lane, cost)
  if not f[4] then
    redis.call('HSET', key_of(job), 'started', now())
    if f[5] then redis.call('ZADD', 'lf:deadlines', 'LT', now() + number(f[5]), job) end
  end
  settle(job)
  local old = f[3] ~= (redis.call('HGET', 'lf:epoch', 'number') or '0')
  return { job, position, token, queue, (doubtful or old) and 1 or 0 }
end

-- The next image of a job's part, and whether it was handed out before; nil when none is left to hand out.
local function next_image(job, queue, owner)
  local part = checkpoint_of(queue)
  local back = redis.call('ZPOPMIN', key_of(job) .. ':returned:' .. part)
  if back[1] then return tonumber(back[1]), true end
  local f = get(job, 'c:' .. part, 'e:' .. part, 'gate', 'handed')
  if f[3] and number(f[4]) >= number(f[3]) and number(f[1]) < number(f[2]) then
    redis.call('HSET', key_of(job), 'gated', '1')
    withdraw_from(queue, owner, job)
    settle(job)
    return nil
  end
  if number(f[1]) < number(f[2]) then
    count(job, 'handed', 1)
    local position = redis.call('HINCRBY', key_of(job), 'c:' .. part, 1) - 1
    if position + 1 >= number(f[2]) then withdraw_from(queue, owner, job) end
    return position, false
  end
  withdraw_from(queue, owner, job)
  return nil
end

-- A suspect runs alone. One worker at a time frees itself for it; the others go on with what is no suspect.
-- Returns the image if there is one for this worker, and whether the worker is to wait until it is free.
local function suspect_for(worker, queue)
  for _, job in ipairs(redis.call('ZRANGE', 'lf:suspects:' .. queue, 0, 3)) do
    local key = key_of(job) .. ':suspects:' .. checkpoint_of(queue)
    for _, position in ipairs(redis.call('ZRANGE', key, 0, 15)) do
      local lone = 'lf:lone:' .. job .. '/' .. position
      local mine = redis.call('GET', lone) == worker or redis.call('SET', lone, worker, 'NX', 'PX', LONE_MS)
      if mine then
        redis.call('PEXPIRE', lone, LONE_MS)
        if redis.call('SCARD', 'lf:worker:' .. worker .. ':claims') > 0 then return nil, true end
        redis.call('DEL', lone)
        redis.call('ZREM', key, position)
        if redis.call('EXISTS', key) == 0 then redis.call('ZREM', 'lf:suspects:' .. queue, job) end
        redis.call('HSET', 'lf:worker:' .. worker .. ':alone', job .. '/' .. position, 1)
        return { job, tonumber(position) }
      end
    end
    if redis.call('EXISTS', key) == 0 then redis.call('ZREM', 'lf:suspects:' .. queue, job) end
  end
  return nil, false
end

-- The owner to be served next from a queue, the virtual time and the first job; owners with all they may run are passed over.
local function next_owner(queue)
  for from = 0, OWNERS_SEEN - 1, 16 do
    local found = redis.call('ZRANGE', 'lf:owners:' .. queue, from, from + 15, 'WITHSCORES')
    for i = 1, #found, 2 do
      local most = limit(found[i], 'running')
      if not most or number(redis.call('HGET', 'lf:owner:' .. found[i], 'running')) < most then
        local job = redis.call('ZRANGE', ready_key(queue, found[i]), 0, 0)[1]
        if job then return found[i], tonumber(found[i + 1]), job end
        withdraw_from(queue, found[i], '')
      end
    end
    if #found < 32 then return nil end
  end
  return nil
end

-- Of a lane's queues, the one whose next owner had least; a checkpoint that is not in the worker's memory may wait a
-- little for those that are, but no longer than STARVED_MS.
local function choose(queues)
  local best
  for _, q in ipairs(queues) do
    local owner, vt, job = next_owner(q.name)
    if job then
      if not q.warm then
        local starved = now() - number(redis.call('GET', 'lf:served:' .. q.name)) > STARVED_MS
        if not starved then
          local cost = number(redis.call('HGET', key_of(job), 'cost'))
          vt = vt + LOOK_AHEAD * cost / (limit(owner, 'weight') or 1)
        end
      end
      if not best or vt < best.vt then best = { vt = vt, queue = q.name, owner = owner, job = job } end
    end
  end
  return best
end

-- The batch lane goes first when one of this worker's queues there has waited for too long.
local function by_urgency(lanes)
  if #lanes < 2 then return lanes end
  for _, q in ipairs(lanes[2].queues) do
    if redis.call('EXISTS', 'lf:owners:' .. q.name) == 1
      and now() - number(redis.call('GET', 'lf:served:' .. q.name)) > STARVED_MS then
      return { lanes[2], lanes[1] }
    end
  end
  return lanes
end

-- claim(worker, lease_ms, [queue, warm]...): an image as grant() tells it, or false. Queues stand in order of urgency.
local function claim(_, a)
  local worker, lease = a[1], tonumber(a[2])
  if redis.call('HLEN', 'lf:worker:' .. worker .. ':alone') > 0 then return false end
  if redis.call('HEXISTS', 'lf:aside', station_of(worker)) == 1 then return false end
  local lanes = {}
  for i = 3, #a, 2 do
    local lane = lane_of(a[i])
    if #lanes == 0 or lanes[#lanes].name ~= lane then lanes[#lanes + 1] = { name = lane, queues = {} } end
    local queues = lanes[#lanes].queues
    queues[#queues + 1] = { name = a[i], warm = a[i + 1] == '1' }
  end
  for _, lane in ipairs(by_urgency(lanes)) do
    for _, q in ipairs(lane.queues) do
      if redis.call('EXISTS', 'lf:suspects:' .. q.name) == 1 then
        local suspect, must_wait = suspect_for(worker, q.name)
        if must_wait then return false end
        if suspect then return grant(suspect[1], suspect[2], worker, q.name, lease, true) end
      end
    end
    local best = choose(lane.queues)
    while best do
      local position, again = next_image(best.job, best.queue, best.owner)
      if position then return grant(best.job, position, worker, best.queue, lease, again) end
      best = choose(lane.queues)
    end
  end
  return false
end

-- Those that waited for an identical image have their turn.
local function wake(owner, content)
  local waiting = 'lf:await:' .. owner .. ':' .. content
  for _, member in ipairs(redis.call('SPOP', waiting, WOKEN)) do
    local job, position = split(member)
    for _, part in ipairs(parts_of(job)) do
      if redis.call('SREM', key_of(job) .. ':awaiting:' .. part, position) == 1 then
        redis.call('ZADD', key_of(job) .. ':returned:' .. part, position, position)
        offer(job, part)
      end
    end
  end
  local left = redis.call('EXISTS', waiting) == 1
  redis.call(left and 'SADD' or 'SREM', 'lf:waking', owner .. ':' .. content)
end

-- stir(limit): wakes more of those of whom some were woken; returns how many pictures still have more
local function stir(_, a)
  for _, waiting in ipairs(redis.call('SRANDMEMBER', 'lf:waking', tonumber(a[1]))) do
    wake(string.match(waiting, '^(.*):([^:]*)$'))
  end
  return redis.call('SCARD', 'lf:waking')
end

-- A claim ends: whoever waited for what it renders goes on.
local function let_go(member, worker)
  local job = split(member)
  local content = redis.call('HGET', 'lf:claim:' .. member, 'content')
  forget(member, worker)
  local owner = redis.call('HGET', key_of(job), 'owner')
  owner_has(owner, 'running', -1)
  count(job, 'running', -1)
  if content then
    if redis.call('HGET', 'lf:rendering:' .. owner, content) == member then
      redis.call('HDEL', 'lf:rendering:' .. owner, content)
    end
    wake(owner, content)
  end
  return owner
end

-- have(owner, content): where an owner's pictures are remembered
local function have_key(owner, content) return 'lf:have:' .. owner .. ':' .. string.sub(content, 1, 4) end

-- An image goes back to wait, or is over if its job is.
local function give_back(job, position)
  local closed = redis.call('HGET', key_of(job), 'closed')
  if closed ~= '' then
    mark(job, position, closed == 'canceled' and 'c' or 'e')
    count(job, closed, 1)
    event(job, 'image ' .. closed, position)
    settle(job)
    return false
  end
  mark(job, position, '\0')
  waits(job, 1)
  return true
end

-- reserve(job, position, token, content): {'render'}, {'have', <job>/<position>} if the owner has this picture,
-- {'wait'} if it is being rendered (the claim is over), {'lost'} if the claim was.
local function reserve(_, a)
  local job, position, member, content = a[1], tonumber(a[2]), a[1] .. '/' .. a[2], a[4]
  if not holds(member, a[3]) then return { 'lost' } end
  local owner = redis.call('HGET', key_of(job), 'owner')
  local there = redis.call('HGET', have_key(owner, content), string.sub(content, 5, 20))
  if there and there ~= member then
    redis.call('HSET', 'lf:claim:' .. member, 'content', content)
    return { 'have', there }
  end
  local other = redis.call('HGET', 'lf:rendering:' .. owner, content)
  if other and other ~= member and redis.call('EXISTS', 'lf:claim:' .. other) == 1 then
    local f = redis.call('HMGET', 'lf:claim:' .. member, 'worker', 'queue')
    let_go(member, f[1])
    count(job, 'starts', -1)
    charge(owner, lane_of(f[2]), -number(redis.call('HGET', key_of(job), 'cost')))
    if give_back(job, position) then
      redis.call('SADD', 'lf:await:' .. owner .. ':' .. content, member)
      redis.call('SADD', key_of(job) .. ':awaiting:' .. checkpoint_of(f[2]), position)
      settle(job)
    end
    return { 'wait' }
  end
  redis.call('HSET', 'lf:rendering:' .. owner, content, member)
  redis.call('HSET', 'lf:claim:' .. member, 'content', content)
  return { 'render' }
end

-- finish(job, position, token, worker, byte, error, cost): 1 if the claim held, 0 if it was lost
local function finish(_, a)
  local job, position, member, byte = a[1], tonumber(a[2]), a[1] .. '/' .. a[2], a[5]
  if not holds(member, a[3]) then return 0 end
  local content = redis.call('HGET', 'lf:claim:' .. member, 'content')
  if content and byte == 's' then
    local owner = redis.call('HGET', key_of(job), 'owner')
    redis.call('HSET', have_key(owner, content), string.sub(content, 5, 20), member)
  end
  local owner = let_go(member, a[4])
  mark(job, position, byte, byte == 's' or byte == 'f')
  count(job, FIELD[byte] or 'succeeded', 1)
  if a[6] ~= '' then redis.call('HSET', key_of(job) .. ':errors', position, a[6]) end
  if a[7] == '0' then count(job, 'starts', -1) end  -- it was there and has not been rendered
  if a[7] ~= '' then
    local f = get(job, 'cost', 'lane')
    local more = tonumber(a[7]) - number(f[1])
    if more ~= 0 then charge(owner, f[2], more) end
  end
  event(job, 'image ' .. (FIELD[byte] or 'succeeded'), position)
  settle(job)
  return 1
end

local function hand_back(member, worker, to)
  local job, position = split(member)
  local queue = redis.call('HGET', 'lf:claim:' .. member, 'queue')
  local owner = let_go(member, worker)
  charge(owner, lane_of(queue), -number(redis.call('HGET', key_of(job), 'cost')))
  if give_back(job, position) then
    redis.call('ZADD', key_of(job) .. ':' .. to .. ':' .. checkpoint_of(queue), to == 'suspects' and now() or position, position)
    settle(job)
    offer(job, checkpoint_of(queue))
    return true
  end
  return false
end

-- release(job, position, token, worker): hand an image back without a mark against it
local function release(_, a)
  local member = a[1] .. '/' .. a[2]
  if not holds(member, a[3]) then return 0 end
  hand_back(member, a[4], 'returned')
  return 1
end

-- disown(worker, member): the worker knows nothing of a claim in its name; hand the image back
local function disown(_, a)
  if redis.call('HGET', 'lf:claim:' .. a[2], 'worker') ~= a[1] then return 0 end
  hand_back(a[2], a[1], 'returned')
  return 1
end

-- A claim whose worker died: its image becomes a suspect, or, once deaths alone with it weigh STRIKES, fails. A worker that
-- was killed, or of which nobody knows, may have died of something else: that weighs half.
local function take_back(member, weight)
  local job, position = split(member)
  local worker = redis.call('HGET', 'lf:claim:' .. member, 'worker')
  if not worker then
    redis.call('ZREM', 'lf:leases', member)
    return
  end
  local alone = redis.call('HEXISTS', 'lf:worker:' .. worker .. ':alone', member) == 1
  local deaths = alone and redis.call('HINCRBY', key_of(job) .. ':deaths', position, weight) or 0
  if deaths >= STRIKES then
    let_go(member, worker)
    count(job, 'failed', 1)
    mark(job, position, 'f', true)
    redis.call('HSET', key_of(job) .. ':errors', position, cjson.encode({
      code = 'QUARANTINED', worker = worker,
      message = 'workers died again and again rendering this image alone, last ' .. worker }))
    event(job, 'image failed', position)
    settle(job)
  elseif hand_back(member, worker, 'suspects') then
    event(job, 'image returned', position)
  end
end

-- expire(limit): takes back images whose worker died; returns how many
local function expire(_, a)
  local members = redis.call('ZRANGEBYSCORE', 'lf:leases', '-inf', now(), 'LIMIT', 0, tonumber(a[1]))
  for _, member in ipairs(members) do take_back(member, KILLED) end
  return #members
end

-- bury(worker, killed): the worker's process is dead, so its images need not wait for their leases; returns how many
local function bury(_, a)
  local members = redis.call('SMEMBERS', 'lf:worker:' .. a[1] .. ':claims')
  for _, member in ipairs(members) do take_back(member, a[2] == '1' and KILLED or OWN_DEATH) end
  redis.call('ZREM', 'lf:workers', a[1])
  redis.call('DEL', 'lf:worker:' .. a[1])
  return #members
end

-- progress(job, position, token, text, lasting): what a claimed image says of its own progress, for as long as it is claimed,
-- or as the last word of its job; 0 if nobody wants it any more, 2 if somebody looks
local function progress(_, a)
  if not holds(a[1] .. '/' .. a[2], a[3]) then return 0 end
  if redis.call('HGET', key_of(a[1]), 'closed') ~= '' then return 0 end
  if a[5] == '1' then redis.call('HSET', key_of(a[1]), 'progress', a[4]) end
  redis.call('HSET', key_of(a[1]) .. ':progress', a[2], a[4])
  return 1 + redis.call('EXISTS', 'lf:look:' .. a[1])
end
