// Base of everything with parameters. A module registers its parameters and children by Megatron's names; there is no
// reflection and no global state. forward is declared by each subclass: (ctx, ...tensors) => Promise<Tensor>.
import type { Parameter } from './parameter.js'

export abstract class Module {
  readonly #parameters = new Map<string, Parameter>()
  readonly #children = new Map<string, Module>()

  /** Registers a parameter under its local name, e.g. `weight`. */
  protected parameter(name: string, parameter: Parameter): Parameter {
    this.#parameters.set(name, parameter)
    return parameter
  }

  /** Registers a child under its local name, e.g. `self_attention` or `layers.3`. */
  protected child<M extends Module>(name: string, module: M): M {
    this.#children.set(name, module)
    return module
  }

  /** Replaces a child: how a wrapper (an adapter) takes a module's place. The caller updates its own field. */
  replaceChild(name: string, module: Module): void {
    this.#children.set(name, module)
  }

  children(): ReadonlyMap<string, Module> {
    return this.#children
  }

  /** Parameters of this module and below, with dotted names, in registration order. A shared parameter appears once, at its first place. */
  *namedParameters(prefix = ''): Generator<[string, Parameter]> {
    const found = new Map<Parameter, string>()
    this.#collect(prefix, found)
    for (const [parameter, name] of found) yield [name, parameter]
  }

  /** Names in the order of the modules; a shared parameter keeps its first. No generator: those are slow when they nest. */
  #collect(prefix: string, found: Map<Parameter, string>): void {
    for (const [name, parameter] of this.#parameters) if (!found.has(parameter)) found.set(parameter, prefix + name)
    for (const [name, child] of this.#children) child.#collect(`${prefix}${name}.`, found)
  }

  /** Modules of this one and below, with dotted names. */
  *namedModules(prefix = ''): Generator<[string, Module]> {
    yield [prefix.replace(/\.$/, ''), this]
    for (const [name, child] of this.#children) yield* child.namedModules(`${prefix}${name}.`)
  }

  dispose(): void {
    for (const [, parameter] of this.namedParameters()) parameter.dispose()
  }
}
