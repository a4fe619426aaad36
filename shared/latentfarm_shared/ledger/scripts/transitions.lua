local transitions = {
  put_name = put_name, take_name = take_name, embeddings_failed = embeddings_failed,
  embeddings_worked = embeddings_worked,
  submit = submit, cancel = cancel, hold = hold, prioritise = prioritise, due = due, retry = retry, scan = scan,
  written = written, clean = clean, delete = delete,
  claim = claim, reserve = reserve, finish = finish, stir = stir, release = release, disown = disown, expire = expire, bury = bury,
  progress = progress,
  beat = beat, leave = leave, rate = rate, ring = ring, answered = answered, epoch = epoch,
}

return transitions[ARGV[1]](KEYS, { unpack(ARGV, 2) })
