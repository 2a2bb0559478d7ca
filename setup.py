"Every field comes from settings.ini, the one place where nbdev looks too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
licenses = {'apache2': 'Apache-2.0'}
statuses = {'1': 'Planning', '2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable'}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license=licenses[cfg['license']],
    long_description=(here / 'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=[f'Development Status :: {cfg["status"]} - {statuses[cfg["status"]]}', f'Intended Audience :: {cfg["audience"]}',
                 f'Natural Language :: {cfg["language"]}', 'Programming Language :: Python :: 3',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    # the package lies beside setup.py; said in so many words, an editable install adds this one folder to sys.path and no import hook
    packages=find_packages(include=['miniai', 'miniai.*']), package_dir={'': '.'},
    include_package_data=False, package_data={'miniai': ['_sample/*']},
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'site', 'tensorboard')},
    entry_points={
        'console_scripts': [line for line in cfg['console_scripts'].split('\n') if line.strip()],
        'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d'],
    },
    zip_safe=False,
)
