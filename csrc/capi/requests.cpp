// Requests of a node (node.h).
#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "capi/node.h"
#include "control/keys.h"

namespace hetkv::capi {
namespace {

constexpr std::uint64_t kMostTokens = std::uint64_t{1} << 31;

Result invalid(std::string text) {
  return failure(HETKV_INPUT, std::move(text));
}

std::uint64_t deadline_ns(std::int64_t timeout_ms) {
  if (timeout_ms < 0) return ~std::uint64_t{0};
  return system_clock()->now_ns() + static_cast<std::uint64_t>(timeout_ms) * 1000000;
}

Result ended(const engine::Outcome& outcome, bool there, std::int64_t timeout_ms) {
  if (!there) {
    return failure(HETKV_TIMEOUT, "not done within " + std::to_string(timeout_ms) + " ms; the request goes on");
  }
  return outcome.phase() == engine::Phase::kFailed ? result_of(outcome.failure()) : Result();
}

std::optional<wire::Content> content_of(const hetkv_request_config& config) {
  if (config.content == nullptr) return std::nullopt;
  wire::Content out{};
  std::memcpy(out.data(), config.content, out.size());
  return out;
}

}  // namespace

// What a caller says of a request, checked: id, tokens and blocks of each cache group.
Result Node::prepare(const hetkv_request_config& config, std::unique_ptr<hetkv_request>* out) {
  if (config.struct_bytes != sizeof(hetkv_request_config)) return invalid("struct_bytes: use HETKV_INIT");
  if (config.id == nullptr || *config.id == '\0') return invalid("a request has an id");
  const std::int64_t groups = pool_->spec.groups();
  if (config.num_groups != groups || config.groups == nullptr) {
    return invalid("the model has " + std::to_string(groups) + " cache groups, the request blocks of " +
                   std::to_string(config.num_groups));
  }
  auto request = std::make_unique<hetkv_request>();
  request->node = shared_from_this();
  request->id = control::request_key(config.id);
  for (std::int64_t group = 0; group < groups; ++group) {
    const hetkv_blocks& given = config.groups[group];
    const std::uint64_t tokens = pool_->is_state(group) ? 1 : given.num_tokens;
    if (tokens < 1 || tokens >= kMostTokens) return invalid("a request has 1 to 2147483647 tokens");
    if (given.num_ids > 0 && given.ids == nullptr) return invalid("block ids are NULL");
    const std::uint64_t cached = sends() || pool_->is_state(group) ? 0 : given.num_cached_tokens;
    if (cached > tokens) return invalid("more tokens are cached than the request has");
    request->blocks.emplace_back(given.ids, given.ids + given.num_ids);
    request->tokens.push_back(pool_->wanted(group, tokens, cached));
    Result result = pool_->check_blocks(group, request->blocks.back(), request->tokens.back().start, tokens);
    if (!result.ok()) return result;
  }
  *out = std::move(request);
  return {};
}

Result Node::send(const hetkv_request_config& config, hetkv_request** out) {
  if (!sends()) return invalid("a receiver does not send");
  std::unique_ptr<hetkv_request> request;
  Result result = prepare(config, &request);
  if (!result.ok()) return result;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return failure(HETKV_CLOSED, "the sender is closed");
  const std::uint64_t hold = config.limit_ms > 0 ? config.limit_ms : settings_.hold_ms;
  const Status status = sender_->submit(
      {request->id, request->tokens, request->blocks, hold, content_of(config), config.priority}, &request->outcome);
  return take(status, std::move(request), out);
}

Result Node::take(const Status& status, std::unique_ptr<hetkv_request> request, hetkv_request** out) {
  if (!status.ok()) return result_of(status);
  *out = request.release();
  requests_[(*out)->outcome->handle] = *out;
  return {};
}

// Every rank of the source instance that holds something this rank holds too.
Result Node::links_of(const char* source, std::vector<std::uint32_t>* out) {
  std::set<std::string> names;
  for (const auto& [id, peer] : peers_) {
    if (!peer->lost) names.insert(peer->link.theirs.instance);
  }
  if (names.empty())
    return failure(HETKV_PEER_LOST, "no sender is connected: connect first, or listen and let it connect");
  if (source == nullptr && names.size() > 1)
    return failure(HETKV_PEER_LOST, "several instances are linked: name the source");
  const std::string name = source == nullptr ? *names.begin() : source;
  std::set<std::int64_t> ranks, needed;
  for (const auto& [id, peer] : peers_) {
    if (peer->lost || peer->link.theirs.instance != name) continue;
    ranks.insert(peer->link.theirs.rank);
    needed.insert(peer->link.agreement.ranks.begin(), peer->link.agreement.ranks.end());
    out->push_back(id);
  }
  if (out->empty()) return failure(HETKV_PEER_LOST, "instance '" + name + "' is not connected");
  for (const std::int64_t rank : needed) {
    if (ranks.count(rank) == 0) {
      return failure(HETKV_PEER_LOST, "rank " + std::to_string(rank) + " of instance '" + name + "' is not connected");
    }
  }
  return {};
}

Result Node::receive(const hetkv_request_config& config, hetkv_request** out) {
  if (sends()) return invalid("a sender does not receive");
  std::unique_ptr<hetkv_request> request;
  Result result = prepare(config, &request);
  if (!result.ok()) return result;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return failure(HETKV_CLOSED, "the receiver is closed");
  engine::Intake intake;
  result = links_of(config.source, &intake.links);
  if (!result.ok()) return result;
  intake.id = request->id;
  intake.want = request->tokens;
  intake.blocks = request->blocks;
  intake.lease_ms = config.limit_ms > 0 ? config.limit_ms : settings_.lease_ms;
  intake.content = content_of(config);
  const Status status = receiver_->receive(std::move(intake), &request->outcome);
  return take(status, std::move(request), out);
}

Result Node::send_layers(hetkv_request* const* requests, std::size_t count, std::uint32_t layer,
                         const std::uint64_t* starts, const std::uint64_t* stops, void* stream) {
  if (!sends()) return invalid("a receiver does not send");
  if (!pool_->shard().layers.holds(layer) || pool_->spec.layers[layer].shares) {
    return invalid("layer " + std::to_string(layer) + " has no memory in this pool");
  }
  const auto group = static_cast<std::size_t>(pool_->spec.layers[layer].group);
  auto batch = std::make_shared<engine::SendBatch>();
  batch->tokens.resize(group + 1);
  for (std::size_t at = 0; at < count; ++at) {
    const hetkv_request& request = *requests[at];
    if (request.node.get() != this) return invalid("a request is another node's");
    const std::uint64_t all = request.tokens[group].stop;
    const std::uint64_t start = starts == nullptr ? 0 : starts[at];
    const std::uint64_t stop = stops == nullptr || stops[at] == 0 ? all : stops[at];
    if (start > stop || stop > all) {
      return invalid("tokens [" + std::to_string(start) + ", " + std::to_string(stop) + "): the request has " +
                     std::to_string(all));
    }
    batch->handles.push_back(request.outcome->handle);
    batch->tokens[group].push_back({start, stop});
  }
  if (device_ == nullptr && stream != nullptr) return invalid("the pool is in host memory: its stream is NULL");
  if (device_ == nullptr) {
    sender_->send_batch(std::move(batch), static_cast<std::int32_t>(layer));
    return {};
  }
  return result_of(sender_->send_batch(std::move(batch), static_cast<std::int32_t>(layer), stream));
}

Result Node::wait(const hetkv_request& request, engine::Phase least, std::int64_t timeout_ms) const {
  return ended(*request.outcome, request.outcome->wait(least, deadline_ns(timeout_ms)), timeout_ms);
}

Result Node::wait_layer(const hetkv_request& request, std::uint32_t layer, std::int64_t timeout_ms) const {
  return ended(*request.outcome, request.outcome->wait_layer(layer, deadline_ns(timeout_ms)), timeout_ms);
}

std::size_t Node::poll(hetkv_request** out, std::size_t most) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const std::uint64_t handle : engine().outcomes().take_ended()) ended_.push_back(handle);
  std::size_t count = 0;
  for (; count < most && !ended_.empty(); ended_.pop_front()) {
    const auto at = requests_.find(ended_.front());
    if (at == requests_.end()) continue;  // its owner has freed it
    out[count++] = at->second;
    requests_.erase(at);
  }
  return count;
}

void Node::abort(const hetkv_request& request, const char* reason) {
  const std::string text = reason == nullptr ? "" : reason;
  if (sends()) {
    sender_->abort(request.outcome->handle, text);
  } else {
    receiver_->abort(request.outcome->handle, text);
  }
}

void Node::forget(const hetkv_request& request) {
  const std::lock_guard<std::mutex> lock(mutex_);
  requests_.erase(request.outcome->handle);
}

}  // namespace hetkv::capi
