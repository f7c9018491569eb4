# One target, the addon. Sources, defines, include folders and libraries are listed by deploy/addon.mjs, so that a new
# .cc file under native/ needs no edit here. Vector code is chosen at run time by Highway, hence no -march; no
# floating-point contraction by the compiler, so that results depend on the code alone. Never unloaded (nodelete): threads
# of the kernels sleep in it.
{
  "targets": [
    {
      "target_name": "viaduct",
      "sources": ["<!@(node deploy/addon.mjs --gyp sources)"],
      "include_dirs": [
        "<!(node -p \"require('node-addon-api').include_dir\")",
        "<!@(node deploy/addon.mjs --gyp includes)"
      ],
      "defines": ["NAPI_VERSION=9", "NAPI_CPP_EXCEPTIONS", "<!@(node deploy/addon.mjs --gyp defines)"],
      "cflags!": ["-fno-exceptions", "-fno-rtti", "-O2", "-O3"],
      "cflags_cc!": ["-fno-exceptions", "-fno-rtti", "-std=gnu++17", "-std=gnu++20", "-std=gnu++1y", "-fno-strict-aliasing"],
      "cflags_cc": [
        "-std=c++17", "-O3", "-g0", "-fPIC", "-fopenmp", "-fexceptions", "-frtti", "-fvisibility=hidden",
        "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-cast-function-type", "-Wno-maybe-uninitialized"
      ],
      "ldflags": ["-fopenmp", "-Wl,--as-needed", "-Wl,--gc-sections", "-Wl,-z,nodelete"],
      "libraries": ["<!@(node deploy/addon.mjs --gyp libraries)", "-lgomp", "-ldl", "-lpthread"],
      "conditions": [
        ["OS=='mac'", {
          "xcode_settings": {
            "GCC_ENABLE_CPP_EXCEPTIONS": "YES",
            "GCC_ENABLE_CPP_RTTI": "YES",
            "GCC_SYMBOLS_PRIVATE_EXTERN": "YES",
            "CLANG_CXX_LANGUAGE_STANDARD": "c++17",
            "CLANG_CXX_LIBRARY": "libc++",
            "MACOSX_DEPLOYMENT_TARGET": "12.0",
            "OTHER_CPLUSPLUSFLAGS": ["-O3", "-ffp-contract=off"]
          }
        }]
      ]
    }
  ]
}
