// The ExecuTorch engine's C interface to the libraries of the `executorch` wheel. Python calls it through ctypes
// (executorch.py), so a device needs neither torch nor ExecuTorch's Python bindings, which link to torch.
//
// A program is a pure function: open, describe, run, close. No call raises or keeps a pointer to its inputs alive; what
// goes wrong is told by lamina_et_error(). One program may be used by one thread at a time.

#include <sys/mman.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <executorch/extension/data_loader/file_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

// Exported by libexecutorch_threadpool.so, whose header is not in the wheel.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace et = executorch::runtime;
namespace ext = executorch::extension;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;

constexpr int32_t kMaxRank = 16;  // ExecuTorch's own limit

// One array: planned shape and type of an input (data is null), a given input, or an output in the runtime's memory.
struct LaminaTensor {
  void* data;
  int64_t sizes[kMaxRank];
  int32_t rank;
  int32_t dtype;  // ScalarType: 1 int8, 4 int64, 6 float32, 11 bool, ...
};

namespace {

thread_local std::string failure;       // what lamina_et_error() tells
thread_local std::string first_logged;  // the runtime's own words on what failed first, which is the cause

// The runtime logs to stderr, also facts about the processor that nobody asked for. Errors are kept for the caller.
void on_log(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message, size_t length) {
  if (level == et_pal_log_level_t::kFatal) {  // the process is about to end: the only way to say why
    std::fprintf(stderr, "executorch: %.*s\n", static_cast<int>(length), message);
  } else if (level == et_pal_log_level_t::kError && first_logged.empty()) {
    first_logged.assign(message, length);
  }
}

int32_t fail(et::Error error) {
  const char* name = et::to_string(error);
  const char* colons = std::strstr(name, "::");
  char code[16];
  std::snprintf(code, sizeof code, " (0x%" PRIx32 ")", static_cast<uint32_t>(error));
  failure = (colons ? colons + 2 : name) + std::string(code) + (first_logged.empty() ? "" : ": " + first_logged);
  return -1;
}

int32_t fail(const std::string& message) {
  failure = message;
  return -1;
}

// Zeroed pages straight from the kernel: a page that a small batch does not reach never becomes resident, and closing a
// program gives all of them back at once. (A std::vector would touch every page of the arena.)
struct Pages {
  void* start = MAP_FAILED;
  size_t bytes = 0;

  explicit Pages(size_t wanted) : bytes(wanted) {
    start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  Pages(Pages&& other) noexcept : start(std::exchange(other.start, MAP_FAILED)), bytes(other.bytes) {}
  ~Pages() {
    if (start != MAP_FAILED) munmap(start, bytes);
  }
};

// Destroyed from the last member to the first, as each one uses those above it.
struct LoadedProgram {
  std::unique_ptr<et::DataLoader> loader;
  std::optional<et::Program> program;
  std::vector<Pages> arena;
  std::vector<et::Span<uint8_t>> spans;
  std::optional<et::HierarchicalAllocator> planned;
  ext::MallocMemoryAllocator method_memory;
  ext::MallocMemoryAllocator scratch;
  std::optional<et::MemoryManager> memory;
  std::optional<et::Method> method;
};

void describe(LaminaTensor& tensor, void* data, const SizesType* sizes, size_t rank, ScalarType dtype) {
  tensor.data = data;
  tensor.rank = static_cast<int32_t>(rank);
  tensor.dtype = static_cast<int32_t>(dtype);
  for (size_t axis = 0; axis < rank; ++axis) tensor.sizes[axis] = sizes[axis];
}

int32_t open(const char* path, LoadedProgram& loaded) {
  // Read, not mapped: with 44 kB to 1 MB of program the peak is the same to 0.1 MiB (measured), and a file that changes
  // under a mapping would end the process.
  auto file = ext::FileDataLoader::from(path);
  if (!file.ok()) return fail(file.error());
  loaded.loader = std::make_unique<ext::FileDataLoader>(std::move(file.get()));
  // The thorough check walks the whole file, so that no offset in it can lead outside.
  auto program = et::Program::load(loaded.loader.get(), et::Program::Verification::InternalConsistency);
  if (!program.ok()) return fail(program.error());
  loaded.program.emplace(std::move(program.get()));

  auto meta = loaded.program->method_meta("forward");
  if (!meta.ok()) return fail(meta.error());
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    auto bytes = meta->memory_planned_buffer_size(i);
    if (!bytes.ok()) return fail(bytes.error());
    if (bytes.get() < 0) return fail("the file plans a negative amount of memory");
    loaded.arena.emplace_back(bytes.get() ? static_cast<size_t>(bytes.get()) : 1);
    const Pages& pages = loaded.arena.back();
    if (pages.start == MAP_FAILED) return fail("no memory for " + std::to_string(pages.bytes) + " bytes of activations");
    loaded.spans.emplace_back(static_cast<uint8_t*>(pages.start), static_cast<size_t>(bytes.get()));
  }
  loaded.planned.emplace(et::Span<et::Span<uint8_t>>(loaded.spans.data(), loaded.spans.size()));
  loaded.memory.emplace(&loaded.method_memory, &*loaded.planned, &loaded.scratch);

  auto method = loaded.program->load_method("forward", &*loaded.memory);
  if (!method.ok()) return fail(method.error());
  loaded.method.emplace(std::move(method.get()));
  for (size_t i = 0; i < meta->num_inputs(); ++i) {
    auto tag = meta->input_tag(i);
    if (!tag.ok() || tag.get() != et::Tag::Tensor) return fail("input " + std::to_string(i) + " is not a tensor");
  }
  for (size_t i = 0; i < meta->num_outputs(); ++i) {
    auto tag = meta->output_tag(i);
    if (!tag.ok() || tag.get() != et::Tag::Tensor) return fail("output " + std::to_string(i) + " is not a tensor");
  }
  return 0;
}

int32_t run(LoadedProgram& loaded, const LaminaTensor* inputs, LaminaTensor* outputs) {
  et::Method& method = *loaded.method;
  for (size_t i = 0; i < method.inputs_size(); ++i) {
    const LaminaTensor& given = inputs[i];
    if (given.rank < 0 || given.rank > kMaxRank) return fail("input " + std::to_string(i) + " has too many axes");
    std::vector<SizesType> sizes(given.rank);
    for (int32_t axis = 0; axis < given.rank; ++axis) {
      if (given.sizes[axis] < 0 || given.sizes[axis] > std::numeric_limits<SizesType>::max()) {
        return fail("input " + std::to_string(i) + " has an axis of " + std::to_string(given.sizes[axis]));
      }
      sizes[axis] = static_cast<SizesType>(given.sizes[axis]);
    }
    auto tensor = ext::from_blob(given.data, std::move(sizes), static_cast<ScalarType>(given.dtype));
    et::Error error = method.set_input(et::EValue(*tensor), i);  // keeps the pointer, copies shape and type
    if (error != et::Error::Ok) {
      fail(error);
      failure = "input " + std::to_string(i) + ": " + failure;
      return -1;
    }
  }
  et::Error error = method.execute();
  if (error != et::Error::Ok) return fail(error);
  for (size_t i = 0; i < method.outputs_size(); ++i) {
    const auto& tensor = method.get_output(i).toTensor();
    describe(outputs[i], tensor.mutable_data_ptr(), tensor.sizes().data(), tensor.dim(), tensor.scalar_type());
  }
  return 0;
}

}  // namespace

extern "C" {

// Version of the wheel whose headers this file was compiled with; those of another one may lay memory out differently. Python
// looks for these bytes in the file, as a library that was once loaded cannot be replaced in the same process.
extern const char lamina_et_version[];
const char lamina_et_version[] = "lamina_et_version=" LAMINA_EXECUTORCH_VERSION ";";

// Once for each process, before anything else: takes over the log and leaves one thread, the caller's. Nonzero on failure.
int32_t lamina_et_start() {
  if (!et::register_pal(et::PalImpl::create(on_log, __FILE__))) return fail("its log cannot be taken over");
  et::runtime_init();
  auto* pool = ext::threadpool::get_threadpool();
  return pool && pool->_unsafe_reset_threadpool(1) ? 0 : fail("its threads cannot be limited to one");
}

// Why the last call on this thread failed.
const char* lamina_et_error() { return failure.c_str(); }

// A handle, or null. The file may be deleted or replaced afterwards.
void* lamina_et_open(const char* path) {
  first_logged.clear();
  auto loaded = std::make_unique<LoadedProgram>();
  return open(path, *loaded) ? nullptr : loaded.release();
}

int32_t lamina_et_num_inputs(const void* handle) {
  return static_cast<int32_t>(static_cast<const LoadedProgram*>(handle)->method->inputs_size());
}

int32_t lamina_et_num_outputs(const void* handle) {
  return static_cast<int32_t>(static_cast<const LoadedProgram*>(handle)->method->outputs_size());
}

// Fills `inputs` (num_inputs of them) with the shapes and types that the program was planned for: the largest it takes.
int32_t lamina_et_inputs(const void* handle, LaminaTensor* inputs) {
  first_logged.clear();
  const auto meta = static_cast<const LoadedProgram*>(handle)->method->method_meta();
  for (size_t i = 0; i < meta.num_inputs(); ++i) {
    auto info = meta.input_tensor_meta(i);
    if (!info.ok()) return fail(info.error());
    if (info->sizes().size() > kMaxRank) return fail("input " + std::to_string(i) + " has too many axes");
    describe(inputs[i], nullptr, info->sizes().data(), info->sizes().size(), info->scalar_type());
  }
  return 0;
}

// Runs the program on num_inputs arrays, which are read in place, and describes num_outputs results. Those lie in the
// program's own memory: they are valid until the next run or close. Nonzero on failure; the program stays usable.
int32_t lamina_et_run(void* handle, const LaminaTensor* inputs, LaminaTensor* outputs) {
  first_logged.clear();
  return run(*static_cast<LoadedProgram*>(handle), inputs, outputs);
}

// Frees everything that belongs to the program.
void lamina_et_close(void* handle) { delete static_cast<LoadedProgram*>(handle); }

}  // extern "C"
