// Binds engine/outcome.h: what callers ask of a request, and wait for.
#include "engine/outcome.h"

#include <algorithm>
#include <optional>
#include <string>

#include "bind.h"
#include "clock.h"

namespace hetkv {
using namespace engine;
namespace {

// Longest sleep between two looks for signals, Ctrl-C above all.
constexpr std::uint64_t kSignalsNs = 50'000'000;

// Calls `wait(deadline_ns, slept)` without the interpreter's lock until it says true or the time is over.
template <typename Wait>
bool wait_for(const std::optional<double>& timeout, Wait wait) {
  constexpr double kLongest = 1e9;  // seconds
  const std::uint64_t now = system_clock()->now_ns();
  const double seconds = std::clamp(timeout.value_or(kLongest), 0.0, kLongest);
  const std::uint64_t deadline = now + static_cast<std::uint64_t>(seconds * 1e9);
  for (std::uint64_t until = now;;) {
    const bool slept = until != now;
    until = std::min(deadline, system_clock()->now_ns() + kSignalsNs);
    bool found = false;
    {
      const py::gil_scoped_release release;
      found = wait(until, slept);
    }
    if (found || until == deadline) return found;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

bool wait_phase(const Outcome& outcome, Phase least, const std::optional<double>& timeout) {
  if (outcome.phase() >= least) return true;
  return wait_for(timeout, [&](std::uint64_t until, bool slept) { return outcome.wait(least, until, slept); });
}

Outcome::Watch watch_named(const std::string& name) {
  if (name == "end") return Outcome::kWatchEnd;
  if (name == "packed") return Outcome::kWatchPacked;
  if (name == "layers") return Outcome::kWatchLayers;
  throw py::value_error("watch " + name);
}

}  // namespace

void bind_outcome(py::module_& m) {
  py::class_<Outcome, std::shared_ptr<Outcome>>(m, "Outcome")
      .def_readonly("handle", &Outcome::handle)
      .def_property_readonly("packed", [](const Outcome& self) { return self.phase() >= Phase::kPacked; })
      .def_property_readonly("ended", &Outcome::ended)
      .def_property_readonly(
          "failure",
          [](const Outcome& self) -> std::optional<std::pair<int, std::string>> {
            if (self.phase() != Phase::kFailed) return std::nullopt;
            return std::make_pair(static_cast<int>(self.failure().code), self.failure().detail);
          },
          "Code and text of the failure; None where it has not failed.")
      .def("arrived", &Outcome::arrived, py::arg("layer"))
      .def(
          "watch", [](Outcome& self, const std::string& what) { self.watch(watch_named(what)); }, py::arg("what"),
          "Have events of it: `end`, `packed` or `layers`.")
      .def(
          "wait",
          [](const Outcome& self, const std::optional<double>& timeout) {
            return wait_phase(self, Phase::kComplete, timeout);
          },
          py::arg("timeout") = py::none(), "Until the request has ended; False after `timeout` seconds.")
      .def(
          "wait_packed",
          [](const Outcome& self, const std::optional<double>& timeout) {
            return wait_phase(self, Phase::kPacked, timeout);
          },
          py::arg("timeout") = py::none(), "Until the request's blocks are not read any more, or it has ended.")
      .def(
          "wait_layer",
          [](const Outcome& self, std::size_t layer, const std::optional<double>& timeout) {
            if (self.arrived(layer)) return true;
            return wait_for(timeout,
                            [&](std::uint64_t until, bool slept) { return self.wait_layer(layer, until, slept); });
          },
          py::arg("layer"), py::arg("timeout") = py::none(), "Until the layer has arrived or the request has ended.");
}

}  // namespace hetkv
