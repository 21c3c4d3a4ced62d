#include "settings.h"

#include <algorithm>
#include <functional>
#include <map>

namespace headroom::ptx {

Settings settings;
std::mt19937_64 chance;
std::vector<std::string> notes;

void seed_settings(uint64_t seed) {
    settings.seed = seed;
    settings.copies = static_cast<Copies>(seed % 3);
    settings.any_order = seed / 3 % 3 == 1;
    settings.weak_memory = settings.always_weak || seed / 3 % 3 == 2;
    chance.seed(seed * 7919 + 17);
}

void change_setting(const std::string& name, int64_t value) {
    static const std::map<std::string, std::function<void(int64_t)>> by_name = {
        {"copies", [](int64_t v) { settings.copies = static_cast<Copies>(v); }},
        {"any_order", [](int64_t v) { settings.any_order = v != 0; }},
        {"weak_memory", [](int64_t v) { settings.weak_memory = v != 0; }},
        {"always_weak", [](int64_t v) { settings.always_weak = v != 0; }},
        {"races", [](int64_t v) { settings.races = v != 0; }},
        {"named_memory", [](int64_t v) { settings.named_memory = v != 0; }},
        {"rough", [](int64_t v) { settings.rough = v != 0; }},
        {"budget", [](int64_t v) { settings.budget = static_cast<uint64_t>(v); }},
    };
    by_name.at(name)(value);
}

void note(const std::string& what) {
    if (std::find(notes.begin(), notes.end(), what) == notes.end()) notes.push_back(what);
}

}  // namespace headroom::ptx
