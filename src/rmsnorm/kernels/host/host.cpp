// Runs the plans that Python makes, without Python; see loader.py.
//
//   norm, an operator  ->  Call  ->  Plan  ->  allocations, launches  ->  outputs
//                                     ^ requested from Python once for each kind of call
//               for anything but plain tensors, or a plan that C++ cannot run, Python makes the call
//   Norm               ->  the same for the gradients, called by autograd

#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/record_function.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

namespace py = pybind11;
using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Word = uint64_t; // an argument of a kernel: an address, or a number in its low bytes
using Tensors = c10::SmallVector<Tensor, 12>;

constexpr size_t MOST_PLANS = 4096, MOST_ARGUMENTS = 48, MOST_OF_MACHINE_CODE = 14, LARGEST_CONFIGURATION = 64;
constexpr size_t MOST_SUMMANDS = 3; // as in spec.py
constexpr int64_t MOST_GROUPS = 1 << 30; // so that they fit into a key
constexpr int NONE = -1; // the place of an absent tensor

// --- calls -----------------------------------------------------------------------------------------------------

// As spec.Gate, with the number of groups.
struct Gate {
  bool sigmoid, first;
  int64_t groups;
};

constexpr std::array<const char*, 3> CASTS{"early", "late", "first"};

struct Spec {
  double eps; // 0 in a backward pass
  int64_t cast; // its place in CASTS
  bool offset; // the offset is 0 or 1
  std::optional<Gate> gate = std::nullopt;
  int64_t whole = 0; // the width of whole rows if a call takes parts of rows
};

enum class Pass {
  FORWARD, BACKWARD, BACKWARD_OF_SUM, FORWARD_PAIR, BACKWARD_PAIR, FORWARD_SANDWICH, GATED_FORWARD, GATED_BACKWARD,
  BEGIN_FORWARD, FINISH_FORWARD, BEGIN_BACKWARD, FINISH_BACKWARD
};
constexpr size_t PASSES = 12;

// name: that of the operator. label: for profilers. tensors: one letter for each tensor of a call, before dy2 and dy3 of
// a sum: t if it is an argument of the operator, l if that is a list, - if it is always absent. rows: the place of x.
// options: one letter for each part of the spec that is an argument after the tensors, in order: w is the width of whole
// rows, e eps, c the cast, g the three arguments of a gate, o the offset. requested: how many outputs the caller
// chooses. arguments: how many the operator has.
struct Facts {
  const char *name, *label;
  std::string_view tensors;
  size_t rows;
  std::string_view options;
  size_t requested, arguments;
};

// Tensors: x, residual, w; or dy, ds, x, w, rstd; for a pair twice, without residuals and ds. Of a sandwich: x, -, w,
// residual, w2. With a gate: x, gate, w; or dy, x, gate, w, rstd. For parts of rows: x, residual; x, w, S; dy, x, w, rstd;
// dy, ds, x, w, rstd, S.
constexpr std::array<Facts, PASSES> facts{{
    {"forward", "rmsnorm", "ttt", 0, "eco", 1, 9}, // the last two arguments are for compilers only
    {"backward", "rmsnorm_backward", "ttttt", 2, "co", 2, 9},
    {"backward_of_sum", "rmsnorm_backward_of_sum", "ltttt", 2, "co", 2, 9},
    {"forward_pair", "rmsnorm_pair", "t-tt-t", 0, "eco", 1, 8},
    {"backward_pair", "rmsnorm_backward_pair", "t-tttt-ttt", 2, "co", 2, 12},
    {"forward_sandwich", "rmsnorm_sandwich", "t-ttt", 0, "eco", 1, 8},
    {"gated_forward", "rmsnorm_gated", "ttt", 0, "ecg", 1, 9},
    {"gated_backward", "rmsnorm_gated_backward", "ttttt", 1, "cg", 3, 12},
    {"begin_forward", "rmsnorm_begin", "tt", 0, "", 0, 2},
    {"finish_forward", "rmsnorm_finish", "ttt", 0, "weco", 1, 8},
    {"begin_backward", "rmsnorm_begin_backward", "tttt", 1, "co", 0, 6},
    {"finish_backward", "rmsnorm_finish_backward", "tttttt", 2, "wco", 1, 10},
}};

constexpr size_t index_of(Pass pass) {
  return static_cast<size_t>(pass);
}

constexpr const Facts& of(Pass pass) {
  return facts[index_of(pass)];
}

// tensors: see Facts, followed by dy2 and dy3 if a sum has them. An absent tensor is undefined.
struct Call {
  Pass pass;
  Tensors tensors;
  Spec spec;
  std::array<bool, 3> requested; // with_rstd; or need_dx, need_dw; or need_dx, need_dgate, need_dw; or need_dw

  const Tensor& rows() const {
    return tensors[of(pass).rows];
  }
};

// Sets the cast and the offset, if they are among the usual ones; Python validates all others.
template <typename Is>
bool set_cast(Spec& spec, const Is& is_cast) {
  const auto* cast = std::find_if(CASTS.begin(), CASTS.end(), is_cast);
  spec.cast = cast - CASTS.begin();
  return cast != CASTS.end();
}

bool set_offset(Spec& spec, double offset) {
  spec.offset = offset == 1.0;
  return offset == 0.0 || offset == 1.0;
}

// Whether the tensors are ordinary CPU or CUDA tensors and nothing intercepts operations on them: no subclass, dispatch
// mode, torch.func transform, tracing, forward-mode tangent, or lazy negation.
bool plain(const Tensors& tensors) {
  static const DispatchKeySet known =
      DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
                      DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect}) |
      c10::autocast_dispatch_keyset;
  auto keys = c10::impl::tls_local_dispatch_key_set().included_;
  for (const auto& t : tensors) {
    if (t.defined()) {
      keys = keys | t.key_set();
      if (t._fw_grad(0).defined()) {
        return false;
      }
    }
  }
  return (keys.raw_repr() & ~known.raw_repr()) == 0;
}

// Whether autograd must record a computation on these tensors.
bool differentiable(const Tensors& tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
    return t.defined() && t.requires_grad();
  });
}

// Whether the storage is large enough for the tensor's shape: other code (FSDP for example) may have resized it.
bool in_memory(const Tensor& t) {
  if (!t.defined() || t.numel() == 0) {
    return true;
  }
  int64_t elements = t.numel();
  if (!t.is_contiguous()) {
    elements = 1;
    for (int64_t i = 0; i < t.dim(); i++) {
      elements += (t.size(i) - 1) * t.stride(i);
    }
  }
  const auto needed = static_cast<size_t>(t.storage_offset() + elements) * t.element_size();
  return t.storage().nbytes() >= needed;
}

// The conditions that are not part of a plan's key: the tensors are in memory, and on the current GPU.
bool fits(const Call& call) {
  const auto& rows = call.rows();
  return std::all_of(call.tensors.begin(), call.tensors.end(), in_memory) &&
      (!rows.is_cuda() || c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA)->getDevice() == rows.device());
}

// --- plans -----------------------------------------------------------------------------------------------------

using CuLaunchKernelEx = int (*)(const void* configuration, void* function, void** arguments, void** extra);

template <size_t... i>
void call_with(Word function, const Word* given, std::index_sequence<i...>) {
  reinterpret_cast<void (*)(decltype(Word(i))...)>(function)(given[i]...);
}

template <size_t count>
void call_with(Word function, const Word* given) {
  call_with(function, given, std::make_index_sequence<count>());
}

// Functions that call machine code, indexed by its number of arguments.
template <size_t... count>
constexpr auto callers_of(std::index_sequence<count...>) {
  return std::array<void (*)(Word, const Word*), sizeof...(count)>{call_with<count>...};
}

constexpr auto callers = callers_of(std::make_index_sequence<MOST_OF_MACHINE_CODE + 1>());

// As plan.NativeTeam.
struct Team {
  int64_t M, rows;
  Word drain, parallel;
  int64_t process, pieces;
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// As plan.NativeLaunch.
struct Launch {
  Word function;
  std::vector<Word> words; // the arguments
  std::vector<int> places; // for each argument the place of the tensor whose address it is; NONE: a number
  std::optional<Team> team;
  Word launcher; // the address of cuLaunchKernelEx; 0 if the function is CPU machine code
  std::string configuration; // CUlaunchConfig
  size_t stream_at; // in the configuration

  bool run(const Word* addresses, void* stream) const {
    Word given[MOST_ARGUMENTS];
    void* pointers[MOST_ARGUMENTS];
    for (size_t i = 0; i < words.size(); i++) {
      given[i] = places[i] == NONE ? words[i] : addresses[places[i]];
      pointers[i] = given + i;
    }
    if (team) {
      return run_by_threads(given);
    }
    if (launcher == 0) {
      callers[words.size()](function, given);
      return true;
    }
    alignas(8) char whole[LARGEST_CONFIGURATION];
    std::memcpy(whole, configuration.data(), configuration.size());
    std::memcpy(whole + stream_at, &stream, sizeof stream);
    const auto launch = reinterpret_cast<CuLaunchKernelEx>(launcher);
    return launch(whole, reinterpret_cast<void*>(function), pointers, nullptr) == 0;
  }

  // As threads.MachineCode.run: torch's OpenMP threads share the rows. Returns false in a forked child, where calling
  // OpenMP would deadlock.
  bool run_by_threads(Word* given) const {
    const int64_t threads = at::get_num_threads();
    if (threads < 2) {
      given[words.size()] = 0;
      given[words.size() + 1] = team->M;
      callers[words.size() + 2](function, given);
      return true;
    }
    if (getpid() != team->process) {
      return false;
    }
    const auto in_pieces = [&](int64_t rows) { return (team->M + rows - 1) / rows; };
    const auto rows = team->rows * std::max<int64_t>(1, in_pieces(team->rows) / (team->pieces * threads));
    Word shared[5 + MOST_ARGUMENTS] = {0, 0, static_cast<Word>(team->M), static_cast<Word>(rows), function};
    std::copy_n(given, words.size(), shared + 5);
    const auto drain = reinterpret_cast<void (*)(void*)>(team->drain);
    if (in_pieces(rows) < 2) {
      drain(shared);
    } else {
      reinterpret_cast<GompParallel>(team->parallel)(drain, shared, threads, 0);
    }
    return true;
  }
};

DispatchKeySet backend_of(const Tensor& t) {
  return DispatchKeySet(t.is_cuda() ? DispatchKey::CUDA : DispatchKey::CPU);
}

// As plan.Fresh.
struct Fresh {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  std::optional<int64_t> value;

  Tensor of(const Tensor& rows) const {
    const auto options = rows.options().dtype(dtype);
    if (value) {
      return at::full(shape, *value, options);
    }
    // As at::empty, but without the dispatcher. If the memory of x is from another allocator, the default one may not
    // be in use, so at::empty chooses.
    auto* allocator = c10::GetAllocator(rows.device().type());
    if (rows.storage().allocator() != allocator) {
      return at::empty(shape, options);
    }
    return at::detail::empty_generic(shape, allocator, backend_of(rows), dtype, std::nullopt);
  }
};

// As plan.Native. Tensors are identified by place instead of name: inputs first, then fresh tensors.
struct Plan {
  std::vector<Fresh> fresh;
  std::vector<Launch> launches;
  std::vector<int> outputs;
  std::shared_ptr<PyObject> keeps;
  bool by_threads = false;

  // Returns the outputs, or nothing if a launch failed.
  std::optional<Tensors> run(const Call& call) const {
    const auto& rows = call.rows();
    void* stream = nullptr;
    if (rows.is_cuda()) {
      stream = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA)->getStream(rows.device()).native_handle();
    }
    Tensors tensors(call.tensors);
    for (const auto& one : fresh) {
      tensors.push_back(one.of(rows));
    }
    c10::SmallVector<Word, 16> addresses;
    for (const auto& t : tensors) {
      addresses.push_back(t.defined() ? reinterpret_cast<Word>(t.const_data_ptr()) : 0);
    }
    for (const auto& launch : launches) {
      if (!launch.run(addresses.data(), stream)) {
        return std::nullopt;
      }
    }
    Tensors found;
    for (const auto place : outputs) {
      found.push_back(place == NONE ? Tensor() : tensors[place]);
    }
    return found;
  }
};

at::ScalarType dtype_of(py::handle object) {
  TORCH_CHECK_TYPE(THPDtype_Check(object.ptr()), "a fresh tensor has no dtype");
  return reinterpret_cast<THPDtype*>(object.ptr())->scalar_type;
}

std::shared_ptr<const Plan> read_plan(const py::object& native) {
  std::unordered_map<std::string, int> places;
  const auto named = [&places](const py::handle& name) { places.emplace(py::cast<std::string>(name), places.size()); };
  const auto place_of = [&places](const py::handle& name) {
    const auto found = places.find(py::cast<std::string>(name));
    TORCH_CHECK_VALUE(found != places.end(), "no tensor of the plan is called ", py::cast<std::string>(name));
    return found->second;
  };
  auto plan = std::make_shared<Plan>();
  for (const auto& name : native.attr("inputs")) {
    named(name);
  }
  for (const auto& one : native.attr("fresh")) {
    named(one.attr("name"));
    plan->fresh.push_back(Fresh{
        dtype_of(one.attr("dtype")), py::cast<std::vector<int64_t>>(one.attr("shape")),
        py::cast<std::optional<int64_t>>(one.attr("value"))});
  }
  for (const auto& one : native.attr("launches")) {
    Launch launch{
        py::cast<Word>(one.attr("function")), {}, {}, {}, py::cast<Word>(one.attr("launcher")),
        py::cast<py::bytes>(one.attr("configuration")), py::cast<size_t>(one.attr("stream_at"))};
    for (const auto& argument : one.attr("arguments")) {
      const bool is_name = py::isinstance<py::str>(argument);
      launch.words.push_back(is_name ? 0 : py::cast<Word>(argument));
      launch.places.push_back(is_name ? place_of(argument) : NONE);
    }
    if (const auto team = one.attr("team"); !team.is_none()) {
      const auto number = [&](const char* name) { return py::cast<int64_t>(team.attr(name)); };
      launch.team = Team{number("M"), number("rows"), py::cast<Word>(team.attr("drain")),
                         py::cast<Word>(team.attr("parallel")), number("process"), number("pieces")};
      plan->by_threads = true;
    }
    const size_t most = launch.launcher == 0 ? MOST_OF_MACHINE_CODE - (launch.team ? 2 : 0) : MOST_ARGUMENTS;
    TORCH_CHECK_VALUE(
        launch.words.size() <= most &&
            launch.configuration.size() <= LARGEST_CONFIGURATION &&
            (launch.launcher == 0 || launch.stream_at + sizeof(void*) <= launch.configuration.size()),
        "a launch of another form");
    plan->launches.push_back(std::move(launch));
  }
  for (const auto& name : native.attr("outputs")) {
    plan->outputs.push_back(name.is_none() ? NONE : place_of(name));
  }
  plan->keeps = std::shared_ptr<PyObject>(py::object(native.attr("keeps")).release().ptr(), [](PyObject* object) {
    const py::gil_scoped_acquire gil;
    Py_DECREF(object);
  });
  return plan;
}

// --- the plan cache --------------------------------------------------------------------------------------------

// Identifies a kind of call by all that a plan depends on: the pass, the spec, the requested outputs, and each tensor's
// dtype, device, shape, strides and alignment, as in plan.TensorKind. Each tensor's numbers begin with its dimensions, so
// calls with different numbers of tensors have different keys.
struct Key {
  c10::SmallVector<int64_t, 48> numbers;

  explicit Key(const Call& call) {
    int64_t eps;
    std::memcpy(&eps, &call.spec.eps, sizeof eps);
    const auto gate = call.spec.gate.value_or(Gate{});
    numbers = {
        eps, static_cast<int64_t>(call.pass) | call.spec.cast << 4 | call.spec.offset << 6 | call.requested[0] << 7 |
            call.requested[1] << 8 | call.requested[2] << 9 | gate.sigmoid << 10 | gate.first << 11 | gate.groups << 16,
        call.spec.whole};
    for (const auto& t : call.tensors) {
      add(t);
    }
  }

  void add(const Tensor& t) {
    if (!t.defined()) {
      numbers.push_back(-1);
      return;
    }
    const auto device = t.device();
    const auto address = reinterpret_cast<Word>(t.const_data_ptr());
    const auto alignment = address | 16;
    numbers.push_back(
        static_cast<int64_t>(t.scalar_type()) | t.dim() << 8 | static_cast<int64_t>(device.type()) << 16 |
        static_cast<int64_t>(device.index() + 1) << 24 | static_cast<int64_t>(alignment & -alignment) << 40);
    numbers.append(t.sizes().begin(), t.sizes().end());
    numbers.append(t.strides().begin(), t.strides().end());
  }

  bool operator==(const Key& other) const {
    return numbers == other.numbers;
  }
};

struct Hash {
  size_t operator()(const Key& key) const {
    size_t hash = 0;
    for (const auto number : key.numbers) {
      hash = (hash ^ static_cast<size_t>(number)) * 0x9E3779B97F4A7C15;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

// A null plan means that Python must make calls of this kind.
using Plans = std::unordered_map<Key, std::shared_ptr<const Plan>, Hash>;
Plans& plans = *new Plans; // never destroyed, because the plans hold Python objects and Python may be finalized earlier
std::shared_mutex& plans_mutex = *new std::shared_mutex;

// From loader.py: for each pass the function that plans it, and the check of saved tensors.
std::array<PyObject*, PASSES> planners{};
PyObject* check_saved = nullptr;

py::object wrapped(const Tensor& t) {
  return t.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(t)) : py::none();
}

// Calls a Python function; throws its error.
py::object call_python(PyObject* function, const py::tuple& arguments) {
  auto found = py::reinterpret_steal<py::object>(PyObject_CallObject(function, arguments.ptr()));
  if (!found) {
    python_error error;
    error.persist();
    throw error;
  }
  return found;
}

std::shared_ptr<const Plan> request_plan(const Call& call) {
  const py::gil_scoped_acquire gil;
  py::list arguments;
  const auto* next = call.tensors.begin();
  const auto* before_spec = next + of(call.pass).tensors.size();
  for (; next != before_spec; next++) {
    arguments.append(wrapped(*next));
  }
  for (const char option : of(call.pass).options) {
    if (option == 'w') {
      arguments.append(call.spec.whole);
    } else if (option == 'e') {
      arguments.append(call.spec.eps);
    } else if (option == 'c') {
      arguments.append(CASTS[call.spec.cast]);
    } else if (option == 'o') {
      arguments.append(call.spec.offset ? 1.0 : 0.0);
    } else {
      const auto& gate = *call.spec.gate;
      arguments.append(gate.sigmoid ? "sigmoid" : "silu");
      arguments.append(gate.first);
      arguments.append(gate.groups);
    }
  }
  for (size_t i = 0; i < of(call.pass).requested; i++) {
    arguments.append(call.requested[i]);
  }
  for (; next != call.tensors.end(); next++) {
    arguments.append(wrapped(*next));
  }
  const auto native = call_python(planners[index_of(call.pass)], py::tuple(arguments));
  return native.is_none() ? nullptr : read_plan(native);
}

// Returns the plan for a call, requested from Python if its kind is new; null if Python must make the call.
// Never waits for the lock: if another thread holds it, or held it when this process was forked, Python makes the call.
std::shared_ptr<const Plan> plan_of(const Call& call) {
  if (!fits(call)) {
    return nullptr;
  }
  Key key(call);
  {
    const std::shared_lock lock(plans_mutex, std::try_to_lock);
    if (!lock) {
      return nullptr;
    }
    const auto found = plans.find(key);
    if (found != plans.end()) {
      return found->second;
    }
  }
  auto plan = request_plan(call);
  Plans dropped; // destroyed after the lock is released, because releasing a Python object can run arbitrary code
  auto before = plan;
  const std::unique_lock lock(plans_mutex, std::try_to_lock);
  if (lock) {
    if (plans.size() >= MOST_PLANS) {
      plans.swap(dropped);
    }
    plans[std::move(key)].swap(before);
  }
  return plan;
}

// Returns the outputs of a call, or nothing if Python must make it. gil: whether this thread holds the GIL.
std::optional<Tensors> run(const Call& call, bool gil = false) {
  const auto plan = plan_of(call);
  if (!plan) {
    return std::nullopt;
  }
  std::optional<py::gil_scoped_release> released;
  if (gil && (plan->by_threads || call.rows().is_cuda())) {
    released.emplace(); // the call may take long, or block until GPU work is done that needs the GIL
  }
  RECORD_FUNCTION(of(call.pass).label, c10::ArrayRef<const c10::IValue>{});
  return plan->run(call);
}

// --- autograd --------------------------------------------------------------------------------------------------

// What the saved tensors were in the forward pass; `t.data = ...` can change that without autograd's knowledge. Those of
// the weight are ignored if there is none. As y has the shape of x, these dimensions say the whole shape of the weight.
struct Saved {
  at::ScalarType rows, w;
  int64_t dims_of_w;
  bool adds; // whether the rows are the sum of add_rms_norm
};

using BackwardOperator = std::tuple<Tensor, Tensor>(
    const Tensor&, const std::optional<Tensor>&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
    c10::string_view, double, bool, bool);

std::optional<Tensor> given_or_not(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
}

// Raises a Python error if the saved tensors are invalid.
void check(const Call& call, const Saved& saved) {
  const py::gil_scoped_acquire gil;
  py::list arguments;
  for (const auto& t : call.tensors) {
    arguments.append(wrapped(t));
  }
  arguments.append(call.spec.offset ? 1.0 : 0.0);
  arguments.append(call.requested[1]);
  for (const auto dtype : {saved.rows, saved.w}) {
    arguments.append(py::handle(reinterpret_cast<PyObject*>(torch::getTHPDtype(dtype))));
  }
  arguments.append(saved.dims_of_w);
  arguments.append(saved.adds);
  call_python(check_saved, py::tuple(arguments));
}

// Returns dx and dw. call.tensors: dy, ds, rows, w, rstd.
std::pair<Tensor, Tensor> gradients(const Call& call, const Saved& saved) {
  const auto& t = call.tensors;
  const bool as_saved = t[2].scalar_type() == saved.rows &&
      (!t[3].defined() || (t[3].scalar_type() == saved.w && t[3].dim() == saved.dims_of_w));
  // In grad mode (create_graph=True) the operator records the gradient, so that differentiating it raises.
  if (as_saved && !at::GradMode::is_enabled() && plain(t)) {
    if (const auto found = run(call)) {
      return {(*found)[0], (*found)[1]};
    }
  }
  check(call, saved);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rmsnorm::backward", "").typed<BackwardOperator>();
  auto [dx, dw] = op.call(
      t[0], given_or_not(t[1]), t[2], given_or_not(t[3]), t[4], CASTS[call.spec.cast],
      call.spec.offset ? 1.0 : 0.0, call.requested[0], call.requested[1]);
  return {call.requested[0] ? dx : Tensor(), call.requested[1] ? dw : Tensor()};
}

} // namespace

namespace rmsnorm {

// As saved_tensors of ops/derivatives.py: adds the fix to torch's error about a saved tensor that was modified in place.
variable_list saved_variables(AutogradContext* ctx, bool adds) {
  try {
    return ctx->get_saved_variables();
  } catch (const c10::Error& error) {
    const std::string said = error.what_without_backtrace();
    TORCH_CHECK(
        said.find("modified by an inplace operation") == std::string::npos,
        adds ? "[add_rms_norm] s, the sum that it returned, or weight" : "[rms_norm] x or weight",
        " was modified in place after the forward pass, which keeps them for the backward pass: write ",
        adds ? "s = s + ... instead of s += ..." : "x = x + ... instead of x += ...",
        ", call optimizer.step() after the last backward pass, or rmsnorm.unpatch the norm (", said, ")");
    throw;
  }
}

// As _Norm of ops/autograd.py: saves the normalized rows, the weight, and rstd (one number a row).
struct Norm : torch::autograd::Function<Norm> {
  static constexpr bool is_traceable = true; // the backward pass uses only what the context saves

  // made: the computed y, s and rstd.
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& w,
      const Tensors* made, Spec spec) {
    const auto &y = (*made)[0], &s = (*made)[1], &rstd = (*made)[2];
    const auto& rows = residual ? s : x;
    ctx->save_for_backward({rows, w ? *w : Tensor(), rstd});
    ctx->set_materialize_grads(false);
    const auto dtype = [](const Tensor& t) { return static_cast<int64_t>(t.scalar_type()); };
    ctx->saved_data["how"] = spec.cast | spec.offset << 2 | static_cast<int64_t>(residual.has_value()) << 3 |
        dtype(x) << 8 | dtype(residual ? *residual : x) << 16 | dtype(rows) << 24 | dtype(w ? *w : rows) << 32 |
        (w ? w->dim() : 1) << 40;
    return residual ? variable_list{y, s} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list given) {
    const auto how = ctx->saved_data["how"].toInt();
    const bool adds = (how & 8) != 0;
    const auto saved = saved_variables(ctx, adds);
    const auto dtype = [how](int bit) { return static_cast<at::ScalarType>(how >> bit & 0xFF); };
    const bool need_x = ctx->needs_input_grad(0), need_residual = adds && ctx->needs_input_grad(1);
    const bool need_dw = saved[1].defined() && ctx->needs_input_grad(adds ? 2 : 1);
    const auto ds = adds ? given[1] : Tensor();
    Tensor d_rows, dw;
    if (given[0].defined()) {
      const Call call{
          Pass::BACKWARD, {given[0], ds, saved[0], saved[1], saved[2]}, {0.0, how & 3, (how & 4) != 0},
          {need_x || need_residual, need_dw, false}};
      std::tie(d_rows, dw) = gradients(call, {dtype(24), dtype(32), how >> 40, adds});
    } else {
      d_rows = ds;
    }
    const auto as = [&](at::ScalarType dtype) { return d_rows.defined() ? d_rows.to(dtype) : d_rows; };
    return {
        need_x ? as(dtype(8)) : Tensor(), need_residual ? as(dtype(16)) : Tensor(), need_dw ? dw : Tensor(), Tensor(),
        Tensor()};
  }
};

} // namespace rmsnorm

namespace {

// --- the operators ---------------------------------------------------------------------------------------------

// The Python implementations, for calls that C++ does not make; see ops/operators.py.
struct Registered {
  c10::SafeKernelFunction backend, autograd;
};

std::array<Registered*, PASSES> python{};

// The call that the operator's arguments on the stack describe; nothing if its spec is unusual (see known_spec) or the
// number of gradients to add is invalid.
std::optional<Call> call_of(Pass pass, torch::jit::Stack& stack) {
  const auto given = torch::jit::last(stack, of(pass).arguments);
  const auto* next = given.begin();
  Call call{pass, {}, {}, {}};
  std::vector<Tensor> summands;
  for (const char what : of(pass).tensors) {
    if (what == '-') {
      call.tensors.push_back(Tensor());
      continue;
    }
    if (what == 'l') {
      summands = next->toTensorVector();
      if (summands.empty() || summands.size() > MOST_SUMMANDS) {
        return std::nullopt;
      }
      call.tensors.push_back(summands[0]);
    } else {
      call.tensors.push_back(next->isNone() ? Tensor() : next->toTensor());
    }
    next++;
  }
  for (size_t i = 1; i < summands.size(); i++) {
    call.tensors.push_back(summands[i]);
  }
  auto& spec = call.spec;
  for (const char option : of(pass).options) {
    bool known = true;
    if (option == 'w') {
      spec.whole = next->toInt();
    } else if (option == 'e') {
      spec.eps = next->toDouble();
    } else if (option == 'c') {
      const auto& cast = next->toStringRef();
      known = set_cast(spec, [&](const char* one) { return cast == one; });
    } else if (option == 'o') {
      known = set_offset(spec, next->toDouble());
    } else {
      const auto& activation = next[0].toStringRef();
      spec.gate = Gate{activation == "sigmoid", next[1].toBool(), next[2].toInt()};
      known = (spec.gate->sigmoid || activation == "silu") && spec.gate->groups >= 1 && spec.gate->groups <= MOST_GROUPS;
      next += 2;
    }
    if (!known) {
      return std::nullopt;
    }
    next++;
  }
  for (size_t i = 0; i < of(pass).requested; i++) {
    call.requested[i] = next[i].toBool();
  }
  return call;
}

// An empty tensor in place of an output that was not requested, because a schema cannot declare an optional one. It is
// what at::empty({0}) returns, made without the dispatcher. Each has a storage of its own, because compilers assume
// that outputs do not alias.
Tensor no_output(const Tensor& rows) {
  auto* allocator = rows.storage().allocator();
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), 0, at::DataPtr(nullptr, rows.device()), allocator, allocator != nullptr);
  return at::detail::make_tensor<c10::TensorImpl>(std::move(storage), backend_of(rows), rows.dtype());
}

// Makes the call if C++ can, and replaces the arguments on the stack by the outputs. Returns whether it did.
bool run_operator(Pass pass, bool autograd, torch::jit::Stack* stack) {
  const auto call = call_of(pass, *stack);
  if (!call || !plain(call->tensors) || (autograd && differentiable(call->tensors))) {
    return false;
  }
  const auto found = run(*call);
  if (!found) {
    return false;
  }
  torch::jit::drop(*stack, of(pass).arguments);
  for (const auto& t : *found) {
    stack->emplace_back(t.defined() ? t : no_output(call->rows()));
  }
  return true;
}

template <Pass pass, bool autograd>
void kernel(const c10::OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
  if (!run_operator(pass, autograd, stack)) {
    const auto& implementation = *python[index_of(pass)];
    (autograd ? implementation.autograd : implementation.backend).callBoxed(op, keys, stack);
  }
}

// Registers kernels of an operator for CPU and CUDA, which take precedence over the Python implementations for all
// devices. torch's dispatcher synchronizes registrations with each other, but not with calls that another thread makes
// at that moment.
template <Pass pass>
void register_operator() {
  using torch::CppFunction;
  const std::string name = of(pass).name;
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("rmsnorm::" + name).c_str(), "");
  python[index_of(pass)] = new Registered{
      op.getComputedKernelForDispatchKey(DispatchKey::CPU),
      op.getComputedKernelForDispatchKey(DispatchKey::AutogradCPU)};
  for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA}) {
    const bool autograd = key == DispatchKey::AutogradCPU || key == DispatchKey::AutogradCUDA;
    auto& library = *new torch::Library(torch::Library::IMPL, "rmsnorm", key, __FILE__, __LINE__); // never undone
    library.impl(name.c_str(), autograd ? CppFunction::makeFromBoxedFunction<&kernel<pass, true>>()
                                        : CppFunction::makeFromBoxedFunction<&kernel<pass, false>>());
  }
}

// --- the Python module -----------------------------------------------------------------------------------------

// Appends the tensor to `tensors`. Returns false if the object is not exactly a Tensor or Parameter.

bool append_tensor(PyObject* object, Tensors& tensors, bool optional) {
  if (optional && object == Py_None) {
    tensors.push_back(Tensor());
    return true;
  }
  if (!THPVariable_CheckExact(object)) {
    return false;
  }
  tensors.push_back(THPVariable_Unpack(object));
  return true;
}

// The call of norm(x, residual, w, eps, cast, offset); nothing if its arguments are not ones that C++ takes.
std::optional<Call> call_of(PyObject* const* given, Py_ssize_t count) {
  Call call{Pass::FORWARD, {}, {}, {}};
  auto& tensors = call.tensors;
  if (count != 6 || !append_tensor(given[0], tensors, false) || !append_tensor(given[1], tensors, true) ||
      !append_tensor(given[2], tensors, true) || !PyFloat_CheckExact(given[3]) || !PyUnicode_CheckExact(given[4]) ||
      !PyFloat_CheckExact(given[5])) {
    return std::nullopt;
  }
  const auto is = [&](const char* cast) { return PyUnicode_CompareWithASCIIString(given[4], cast) == 0; };
  call.spec.eps = PyFloat_AS_DOUBLE(given[3]);
  if (!set_cast(call.spec, is) || !set_offset(call.spec, PyFloat_AS_DOUBLE(given[5])) || !plain(tensors)) {
    return std::nullopt;
  }
  call.requested[0] = differentiable(tensors);
  if (call.requested[0] &&
      std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.defined() && t.is_inference(); })) {
    return std::nullopt; // autograd cannot save such a tensor
  }
  return call;
}

// makes(x, residual, w, eps, cast, offset): whether `norm` would make this call in C++.
PyObject* makes(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto call = call_of(given, count);
  return PyBool_FromLong(call && plan_of(*call) != nullptr);
  END_HANDLE_TH_ERRORS
}

// A hook for saved tensors can raise, as that of non-reentrant checkpointing does to end a recomputation early. Then torch
// leaves s among the tensors that its own node saves or is to save, and the two would keep each other alive.
void release_unsaved(const Tensors& made) {
  for (const auto& t : made) {
    if (t.defined()) {
      if (auto* node = dynamic_cast<torch::autograd::CppNode<rmsnorm::Norm>*>(t.grad_fn().get())) {
        node->ctx_.save_for_backward({});
        node->release_variables(); // those that were saved before
      }
    }
  }
}

// norm(x, residual, w, eps, cast, offset): returns y, or (y, s) with a residual; None if Python must make the call.
PyObject* norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto call = call_of(given, count);
  if (!call) {
    Py_RETURN_NONE;
  }
  const auto& tensors = call->tensors;
  const auto made = run(*call, true);
  if (!made) {
    Py_RETURN_NONE;
  }
  variable_list outputs{(*made)[0], (*made)[1]};
  if (call->requested[0]) {
    const Tensors* all = &*made;
    try {
      outputs = rmsnorm::Norm::apply(tensors[0], given_or_not(tensors[1]), given_or_not(tensors[2]), all, call->spec);
    } catch (...) {
      release_unsaved(*made);
      throw;
    }
  }
  if (!tensors[1].defined()) {
    return THPVariable_Wrap(outputs[0]);
  }
  return PyTuple_Pack(2, wrapped(outputs[0]).ptr(), wrapped(outputs[1]).ptr());
  END_HANDLE_TH_ERRORS
}

PyMethodDef fast_methods[] = {
    {"norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(norm)), METH_FASTCALL, nullptr},
    {"makes", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(makes)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

} // namespace

PYBIND11_MODULE(RMSNORM_HOST, module) {
  PyModule_AddFunctions(module.ptr(), fast_methods);
  module.def("begin", [](const py::dict& planners_by_name, const py::object& check) {
    if (check_saved != nullptr) {
      return; // another thread has loaded the library too
    }
    for (size_t i = 0; i < PASSES; i++) {
      planners[i] = Py_NewRef(py::object(planners_by_name[facts[i].name]).ptr());
    }
    check_saved = Py_NewRef(check.ptr());
    register_operator<Pass::FORWARD>();
    register_operator<Pass::BACKWARD>();
    register_operator<Pass::BACKWARD_OF_SUM>();
    register_operator<Pass::FORWARD_PAIR>();
    register_operator<Pass::BACKWARD_PAIR>();
    register_operator<Pass::FORWARD_SANDWICH>();
    register_operator<Pass::GATED_FORWARD>();
    register_operator<Pass::GATED_BACKWARD>();
    register_operator<Pass::BEGIN_FORWARD>();
    register_operator<Pass::FINISH_FORWARD>();
    register_operator<Pass::BEGIN_BACKWARD>();
    register_operator<Pass::FINISH_BACKWARD>();
  });
  module.def("forget", [] {
    Plans dropped;
    const std::unique_lock lock(plans_mutex);
    plans.swap(dropped);
  });
  module.def("cached_plans", [] {
    const std::shared_lock lock(plans_mutex);
    return plans.size();
  });
}
