// Who takes the turns of an engine, one at a time: its progress thread, or a caller that waits for a request and would
// otherwise wait for that thread, which then stands back. So a request needs one thread of a process and no hand-over
// between two. Lives as long as the last request's outcome; thread safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "status.h"

namespace hetkv::engine {

class Engine;

class Turns {
 public:
  Turns() = default;
  ~Turns();
  Turns(const Turns&) = delete;
  Turns& operator=(const Turns&) = delete;

  // Before the progress thread starts. `by_callers`: they may take turns, too.
  Status start(Engine* engine, bool by_callers);
  int wake_fd() const { return wake_fd_; }  // readable once the thread is woken
  // What turns read and write is the lock holder's.
  std::mutex& mutex() { return mutex_; }
  // With the lock: no caller takes a turn any more.
  void end() { engine_ = nullptr; }

  // Any thread: there is a command. Wakes the progress thread where nobody else will see it.
  void post();
  bool posted() const { return posted_.load(); }
  // Any thread: the progress thread has to look again when it is due.
  void rouse();
  // Before the commands are taken.
  void take_posted() { posted_.store(false); }

  // Progress thread: from now on it is woken; looks at what is posted after that.
  void fall_asleep();
  void wake_up();
  bool taken() const { return taken_.load(); }
  // Sleeps while callers take turns, for 1 ms at most: one that is slow, or has left when nothing was under way, keeps
  // no message longer.
  void stand_back();

 private:
  friend class CallerTurns;
  bool enter(int process);
  bool take();
  void leave();
  void wake();

  std::mutex mutex_;
  Engine* engine_ = nullptr;  // null: it has ended
  bool by_callers_ = false;
  int process_ = 0;  // a forked child takes none of its parent's
  int wake_fd_ = -1;
  bool left_over_ = true;  // the caller's that takes turns: what is under way needs a thread when it leaves
  std::atomic<bool> taken_{false};
  std::atomic<bool> posted_{false};
  std::atomic<bool> sleeping_{false};
};

// The turns that one caller takes while it waits.
class CallerTurns {
 public:
  explicit CallerTurns(Turns* turns) : turns_(turns) {}
  ~CallerTurns() {
    if (mine_) turns_->leave();
  }
  CallerTurns(const CallerTurns&) = delete;
  CallerTurns& operator=(const CallerTurns&) = delete;

  // Whether it is this caller that takes them.
  bool enter();
  // Takes one, unless the progress thread is in one. True: something moved.
  bool take() { return turns_->take(); }

 private:
  Turns* const turns_;
  bool mine_ = false;
};

}  // namespace hetkv::engine
