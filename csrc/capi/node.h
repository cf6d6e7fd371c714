// A sender or receiver of the C library: an engine, its links to peers, and the requests under way. What
// hetkv/transport does in Python.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "capi/pool.h"
#include "control/handshake.h"
#include "engine/receiver.h"
#include "engine/sender.h"

namespace hetkv::capi {
class Node;
}

// A request as its owner sees it.
struct hetkv_request {
  std::shared_ptr<hetkv::capi::Node> node;
  std::shared_ptr<hetkv::engine::Outcome> outcome;
  std::array<std::uint8_t, 16> id{};
  std::vector<std::vector<std::int32_t>> blocks;
  std::vector<hetkv::wire::TokenRange> tokens;
};

namespace hetkv::capi {

struct NodeSettings {
  std::string instance;
  std::vector<std::uint8_t> secret;
  std::map<std::string, std::string> fingerprint;
  std::string backends;
  engine::EngineConfig engine;
  std::uint32_t lease_ms = 60000;
  std::uint32_t hold_ms = 120000;
  std::uint32_t handshake_timeout_ms = 10000;
};

Result read_settings(const hetkv_node_config& config, const Pool& pool, NodeSettings* out);

class Node : public std::enable_shared_from_this<Node> {
 public:
  static Result create(control::Role role, std::shared_ptr<const Pool> pool, NodeSettings settings,
                       std::shared_ptr<Node>* out);
  ~Node();

  Result listen(const std::string& address, std::string* bound);
  Result connect(const std::string& address);
  std::size_t peers();
  // Ends everything and joins the threads. Idempotent.
  void close();

  Result send(const hetkv_request_config& config, hetkv_request** out);
  Result receive(const hetkv_request_config& config, hetkv_request** out);
  Result send_layers(hetkv_request* const* requests, std::size_t count, std::uint32_t layer,
                     const std::uint64_t* starts, const std::uint64_t* stops, void* stream);
  Result wait(const hetkv_request& request, engine::Phase least, std::int64_t timeout_ms) const;
  Result wait_layer(const hetkv_request& request, std::uint32_t layer, std::int64_t timeout_ms) const;
  std::size_t poll(hetkv_request** out, std::size_t most);
  void abort(const hetkv_request& request, const char* reason);
  void forget(const hetkv_request& request);

  const Pool& pool() const { return *pool_; }
  bool sends() const { return role_ == control::Role::kSender; }

 private:
  // One linked peer, and the thread that waits for its connection's end.
  struct Peer {
    control::Linked link;
    std::string name;
    std::uint32_t id = 0;
    bool lost = false;
    std::thread reader;
  };

  // Somebody who has connected, in a thread of its own.
  struct Handshake {
    std::thread thread;
    std::shared_ptr<std::atomic<bool>> done;
  };

  Node(control::Role role, std::shared_ptr<const Pool> pool, NodeSettings settings);
  Result start();
  Result add(control::Linked link);
  void read(const std::shared_ptr<Peer>& peer);
  void dispatch();
  void accept(int descriptor);
  Result prepare(const hetkv_request_config& config, std::unique_ptr<hetkv_request>* out);
  Result take(const Status& status, std::unique_ptr<hetkv_request> request, hetkv_request** out);
  Result links_of(const char* source, std::vector<std::uint32_t>* out);
  engine::Engine& engine() {
    if (sender_) return *sender_;
    return *receiver_;
  }

  const control::Role role_;
  const std::shared_ptr<const Pool> pool_;
  const NodeSettings settings_;
  std::shared_ptr<engine::Device> device_;
  std::unique_ptr<engine::Sender> sender_;
  std::unique_ptr<engine::Receiver> receiver_;
  control::Side side_;
  control::Desk desk_;
  std::thread dispatcher_;

  std::mutex mutex_;
  bool closed_ = false;
  std::map<std::uint32_t, std::shared_ptr<Peer>> peers_;
  std::vector<std::shared_ptr<Peer>> gone_;           // whose reader has not been joined
  std::map<std::uint64_t, hetkv_request*> requests_;  // that `poll` has not handed out, by handle
  std::deque<std::uint64_t> ended_;                   // of these
  std::vector<int> listening_;
  std::vector<std::thread> acceptors_;
  std::vector<Handshake> handshakes_;
  int stop_[2] = {-1, -1};
};

}  // namespace hetkv::capi
